"""Features that are read from their place in a file: the right ones, and of no file that was changed."""

from __future__ import annotations

import gc
import os
import time

import pytest
import torch

from ezhoi_diffusion.features import rows as module
from ezhoi_diffusion.features.rows import RepeatedRows, StoredRows
from ezhoi_diffusion.features.store import FeatureStore, FeatureStoreError
from ezhoi_diffusion.features.unlabelled import Unlabelled
from ezhoi_diffusion.testing import synthetic_store
from helpers.stores import write

CHOSEN = [5, 2, 5, 0, -1, 3]


@pytest.fixture
def store(tmp_path):
    """A capture of several shards, older than a tick of the clock: only then are checksums remembered."""
    write(tmp_path / "f", rows_per_shard=2)
    time.sleep(0.02)
    return FeatureStore(tmp_path / "f")


def everything(rows):
    return rows[torch.arange(len(rows))]


def shards_of(store):
    return [store.folder / shard["file"] for shard in store.index["shards"]]


def overwrite(path, data):
    """Change a file in its place."""
    with path.open("r+b") as file:
        file.write(data)


def test_logits_are_read_the_same_way(tmp_path):
    store = synthetic_store(tmp_path / "f")
    wanted = torch.tensor(CHOSEN) % len(store)
    assert torch.equal(StoredRows(store, name="logits")[wanted], store.rows("logits")[wanted])
    assert StoredRows(store, name="logits").shape == store.rows("logits").shape


@pytest.mark.parametrize("files", [1, 128])
@pytest.mark.parametrize("view_of", [lambda s: s, lambda s: s.subset([0, 2, 5]).subset([1, 2]), Unlabelled])
def test_they_are_those_of_the_tensor_in_any_order(store, view_of, files, monkeypatch):
    monkeypatch.setattr(module, "MAX_OPEN", files)
    assert len(shards_of(store)) > 2
    view = view_of(store)
    whole, rows = view.adapter_feat(), StoredRows(view)
    chosen = torch.tensor(CHOSEN) % len(whole)
    for _ in range(2):  # the second time, from their places
        assert torch.equal(rows[chosen], whole[chosen])
        assert torch.equal(torch.cat([*rows.split(3)]), whole)
        assert rows[chosen[:0]].shape == (0, whole.shape[1])
    assert len(rows._files) <= files
    part = torch.arange(1, len(whole), 2)
    some = StoredRows(view, part)
    assert len(some) == len(part)
    assert torch.equal(some[torch.tensor([1, 0])], whole[part][[1, 0]])


def test_a_shard_is_read_whole_once(tmp_path, monkeypatch):
    store = synthetic_store(tmp_path / "f")
    time.sleep(0.02)
    whole, rows = store.adapter_feat(), StoredRows(store)
    everything(rows)
    monkeypatch.setattr(FeatureStore, "_read_shard", lambda *_: pytest.fail("a shard is read whole again"))
    chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    assert torch.equal(rows[chosen], whole[chosen])


def test_a_shard_is_checked_before_its_first_feature_is_read(store):
    first, last = shards_of(store)[0], shards_of(store)[-1]
    whole = store.adapter_feat()
    overwrite(last, bytes(reversed(last.read_bytes())))
    rows = StoredRows(store)
    assert torch.equal(rows[torch.tensor([0])], whole[:1]), first
    with pytest.raises(FeatureStoreError, match=last.name):
        rows[torch.tensor([0, len(whole) - 1])]


def flipped(path):
    """The file with another last bit, which belongs to some tensor."""
    data = path.read_bytes()
    return data[:-1] + bytes([data[-1] ^ 1])


def replaced(path):
    other = path.with_name("other")
    other.write_bytes(flipped(path))
    other.replace(path)


def cut(path):
    os.truncate(path, path.stat().st_size - 8)


def changed_in_place_with_its_old_time(path):
    status = path.stat()
    overwrite(path, flipped(path))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("files", [1, 128])
@pytest.mark.parametrize("change", [replaced, cut, changed_in_place_with_its_old_time, os.unlink])
def test_a_file_that_changed_since_is_noticed(store, change, files, monkeypatch):
    monkeypatch.setattr(module, "MAX_OPEN", files)
    rows = StoredRows(store)
    everything(rows)
    change(shards_of(store)[1])
    with pytest.raises(FeatureStoreError, match=shards_of(store)[1].name):
        everything(rows)


def test_a_file_that_was_only_touched_or_copied_is_checked_again(store):
    whole, rows = store.adapter_feat(), StoredRows(store)
    everything(rows)
    one, other = shards_of(store)[:2]
    os.utime(one)
    copy = other.with_name("copy")
    copy.write_bytes(other.read_bytes())
    copy.replace(other)
    for _ in range(3):
        assert torch.equal(everything(rows), whole)
        time.sleep(0.02)
    assert {0, 1} <= rows._places.keys()


def test_its_files_are_closed_with_it(store):
    rows = StoredRows(store)
    everything(rows)
    files = [*rows._files.values()]
    assert files
    del rows
    gc.collect()
    for file in files:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)


def test_repeated_rows_are_those_of_the_table():
    table, of = torch.randn(4, 3), torch.tensor([3, 1, 1, 0, 2])
    rows = RepeatedRows(table, of)
    assert (len(rows), rows.shape) == (5, (5, 3))
    assert torch.equal(rows[torch.tensor([0, 4])], table[[3, 2]])
    assert torch.equal(torch.cat([*rows.split(2)]), table[of])

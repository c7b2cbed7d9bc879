"""The feature store returns what was written, also after interruptions."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from ezhoi_diffusion.features import shard as shard_module
from ezhoi_diffusion.features.statistics import ModalityStatistics, mean_resultant_lengths, unit_sums
from ezhoi_diffusion.features.store import FeatureStore, FeatureStoreError
from ezhoi_diffusion.features.writer import FeatureWriter, finish_store, write_ezhoi_tensors
from ezhoi_diffusion.files import json_bytes, read_json, write_json
from helpers.miniature import rewrite
from helpers.stores import IMAGES, META, D, image, write


def shard_bytes(store):
    return [(store.folder / shard["file"]).read_bytes() for shard in store.index["shards"]]


def test_round_trip(tmp_path):
    store = write(tmp_path / "f", rows_per_shard=4)
    assert len(store.index["shards"]) > 1
    assert len(store) == 14
    assert torch.equal(store.adapter_feat(), torch.cat([b.adapter_feat for b in IMAGES]))
    assert torch.equal(store.rows("labels"), torch.cat([b.labels for b in IMAGES]))
    assert torch.equal(store.rows("pairing"), torch.cat([b.pairs.pairing.T for b in IMAGES]).int())
    assert store.image_index().tolist() == [0] * 3 + [2] * 5 + [3] * 2 + [5] * 4
    assert [(i["name"], i["rows"]) for i in store.images][1] == ("1.jpg", 0)
    assert store.context.keys() == {"ctx.0"}


def test_statistics_are_means_of_unit_features(tmp_path):
    store = write(tmp_path / "f", rows_per_shard=4)
    unit = torch.nn.functional.normalize(store.adapter_feat(), dim=-1)
    statistics = store.statistics()
    assert torch.allclose(statistics.visual_mean, unit.mean(0), atol=1e-6)
    # the norm of the mean is the root of the mean pairwise cosine
    assert float(statistics.visual_mean.norm() ** 2) == pytest.approx(float((unit @ unit.T).mean()), abs=1e-6)
    again = ModalityStatistics.from_tensors(statistics.tensors())
    assert torch.equal(again.text_mean, statistics.text_mean)
    assert again.visual_rows == 14


def test_a_resumed_capture_gives_the_same_features(tmp_path):
    whole = write(tmp_path / "whole", rows_per_shard=4)
    writer = FeatureWriter(tmp_path / "cut", META, rows_per_shard=4)
    for batch in IMAGES[:4]:
        writer.add(batch)
    writer.close()
    assert not (tmp_path / "cut" / "index.json").exists()  # killed here: image 3 was not yet written
    with pytest.raises(FeatureStoreError, match="is unfinished: run the capture command again"):
        FeatureStore(tmp_path / "cut")
    assert FeatureWriter(tmp_path / "cut", META).next_index == 3
    again = write(tmp_path / "cut", rows_per_shard=4)
    assert torch.equal(again.adapter_feat(), whole.adapter_feat())
    assert [i["name"] for i in again.images] == [i["name"] for i in whole.images]
    assert [again.index["shards"], shard_bytes(again)] == [whole.index["shards"], shard_bytes(whole)]


def test_a_shard_without_its_entry_does_not_count(tmp_path):
    writer = FeatureWriter(tmp_path, META, rows_per_shard=1)
    writer.add(IMAGES[0])
    writer.close()
    (tmp_path / "shard-000-00000.json").unlink()  # killed between the two files
    assert FeatureWriter(tmp_path, META).next_index == 0
    assert torch.equal(write(tmp_path).adapter_feat(), torch.cat([b.adapter_feat for b in IMAGES]))


def test_processes_merge_in_the_order_of_the_split(tmp_path):
    for rank, part in enumerate((IMAGES[:3], IMAGES[3:])):
        writer = FeatureWriter(tmp_path, META, rank=rank, rows_per_shard=4)
        for batch in part:
            writer.add(batch)
        writer.flush()
    write_ezhoi_tensors(tmp_path, {"text": torch.randn(7, D)})
    assert torch.equal(finish_store(tmp_path).adapter_feat(), torch.cat([b.adapter_feat for b in IMAGES]))


def test_other_captures_are_left_alone(tmp_path):
    write(tmp_path / "done")
    before = sorted((p.name, p.read_bytes()) for p in (tmp_path / "done").iterdir())
    with pytest.raises(FeatureStoreError, match="holds a finished capture"):
        FeatureWriter(tmp_path / "done", META)
    FeatureWriter(tmp_path / "part", META)
    with pytest.raises(
        FeatureStoreError, match=r"unfinished capture of another run or split \(split: there 'train', now 'test'\)"
    ):
        FeatureWriter(tmp_path / "part", {**META, "split": "test"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FeatureStoreError, match="is not empty and holds no capture"):
        FeatureWriter(tmp_path / "mine", META)
    assert sorted((p.name, p.read_bytes()) for p in (tmp_path / "done").iterdir()) == before


def test_not_finite_features_are_refused_and_the_images_before_them_kept(tmp_path):
    bad = replace(IMAGES[2], adapter_feat=IMAGES[2].adapter_feat.clone())
    bad.adapter_feat[1, 3] = float("nan")
    writer = FeatureWriter(tmp_path, META)
    for batch in (*IMAGES[:2], bad, IMAGES[3]):
        writer.add(batch)
    for again in (writer.flush, lambda: writer.add(IMAGES[4]), writer.flush, writer.close):
        with pytest.raises(FeatureStoreError, match=r"image 2\.jpg: adapter_feat has values that are not finite"):
            again()
    assert FeatureWriter(tmp_path, META).next_index == 2
    assert torch.equal(write(tmp_path).adapter_feat(), torch.cat([b.adapter_feat for b in IMAGES]))


def damage(path, how):
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-9], "flip": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "empty": b""}[how])


@pytest.mark.parametrize("how", ["cut", "flip", "empty"])
def test_damaged_shards_are_never_read(tmp_path, how):
    write(tmp_path)
    damage(tmp_path / "shard-000-00000.safetensors", how)
    with pytest.raises(FeatureStoreError, match=r"shard-000-00000\.safetensors"):
        FeatureStore(tmp_path).adapter_feat()


@pytest.mark.parametrize("name", ["index.json", "meta.json", "ezhoi.safetensors"])
@pytest.mark.parametrize("how", ["cut", "empty"])
def test_damaged_files_are_one_typed_error(tmp_path, name, how):
    write(tmp_path)
    damage(tmp_path / name, how)
    with pytest.raises(FeatureStoreError, match=name):
        FeatureStore(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shards": None}, "missing required field `shards`"),
        ({"shards": [{}]}, r"missing required field .* at `\$\.shards\[0\]`"),
        ({"shards": []}, r"length >= 1 - at `\$\.shards`"),
        ({"rows": 13}, "it has 13 rows, its shards 14"),
        ({"images": 5}, "it has 5 images, its shards 6"),
        ({"ezhoi": {}}, r"at `\$\.ezhoi`"),
        ({"schema": 99}, r"99 - at `\$\.schema`"),
        ({"meta": {**META, "schema": 2, "split": "test"}}, "belongs to another capture"),
    ],
)
def test_an_index_that_says_something_else_is_one_typed_error(tmp_path, change, says):
    write(tmp_path)
    rewrite(tmp_path / "index.json", **change)
    with pytest.raises(FeatureStoreError, match=says):
        FeatureStore(tmp_path)


def test_a_capture_without_any_pair_is_an_error(tmp_path):
    with pytest.raises(FeatureStoreError, match="no image had a human-object pair"):
        write(tmp_path, [image(0, 0), image(1, 0)])
    assert not (tmp_path / "index.json").exists()


def test_no_store_is_no_store(tmp_path):
    with pytest.raises(FeatureStoreError, match="holds no captured features: capture them with"):
        FeatureStore(tmp_path / "nowhere")


def test_mean_resultant_length_is_what_remains_without_the_mean():
    a, b = 0.6, 0.8
    rows = torch.tensor([[a, b], [a, -b]]) * torch.tensor([[2.0], [5.0]])
    assert mean_resultant_lengths([rows[:1], rows[1:]], [torch.tensor([a, 0.0])])[0] == pytest.approx(0, abs=1e-7)
    assert mean_resultant_lengths([rows], [torch.zeros(2)])[0] == pytest.approx(a)
    off = torch.tensor([0.0, 0.5])  # leaves (.6, .3) and (.6, -1.3)
    left = torch.stack([torch.tensor([0.6, 0.3]) / 0.45**0.5, torch.tensor([0.6, -1.3]) / 2.05**0.5])
    assert mean_resultant_lengths([rows], [off])[0] == pytest.approx(float(left.mean(0).norm()))


def test_sums_of_unit_features_are_those_of_features_that_were_made_unit():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(1500, 16, generator=draw) * torch.rand(1500, 1, generator=draw) * 9
    features[7] = 0  # has no direction
    features[8] *= 1e-20
    means = torch.stack([torch.zeros(16), normalize(features, dim=1).mean(0), torch.rand(16, generator=draw)]).double()
    total, around = unit_sums(features, means)
    unit = normalize(features.double(), dim=1)
    torch.testing.assert_close(total, unit.sum(0), rtol=1e-12, atol=1e-11)
    for mean, found in zip(means, around, strict=True):
        torch.testing.assert_close(found, normalize(unit - mean, dim=1).sum(0), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("spread", [0.0, 1e-8, 1e-4])
def test_the_cone_around_the_mean_of_collapsed_features_is_no_rounding(spread):
    draw = torch.Generator().manual_seed(0)
    one, noise = torch.rand(1, 16, generator=draw).double(), torch.randn(600, 16, generator=draw).double()
    features = normalize(one, dim=1) + spread * noise
    mean = normalize(features, dim=1).mean(0)
    expected = normalize(normalize(features, dim=1) - mean, dim=1).mean(0).norm()
    (found,) = mean_resultant_lengths([features], [mean])
    assert found <= 1 + 1e-9
    assert found == pytest.approx(float(expected), abs=1e-6)


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    writer = FeatureWriter(tmp_path, META)
    broken = replace(IMAGES[0], logits=IMAGES[0].logits.clone().fill_(float("inf")))
    writer.add(broken)
    with pytest.raises(FeatureStoreError, match=r"0\.jpg: logits has values that are not finite"):
        writer.flush()
    assert not list(tmp_path.glob("shard-*"))


def test_what_was_added_is_a_copy(tmp_path):
    writer = FeatureWriter(tmp_path, META)
    feature = torch.ones(3, D)
    writer.add(replace(IMAGES[0], adapter_feat=feature))
    feature.zero_()
    writer.flush()
    write_ezhoi_tensors(tmp_path, {"text": torch.randn(7, D)})
    assert torch.equal(finish_store(tmp_path).adapter_feat(), torch.ones(3, D))


# -- the thread that writes --------------------------------------------------------------------------------------------

PATIENCE = 60.0  # seconds


def add_all(writer, images):
    for batch in images:
        writer.add(batch)


def is_shard(handle):
    return ".shard-" in str(Path(f"/proc/self/fd/{handle}").readlink())


def test_the_pass_does_not_wait_for_the_disk_until_two_shards_are_in_memory(tmp_path, monkeypatch):
    images = [image(index, 2) for index in range(12)]
    stalled, works, real = threading.Event(), threading.Event(), os.fsync

    def fsync(handle):
        if is_shard(handle):
            stalled.set()
            assert works.wait(PATIENCE)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    writer, added = FeatureWriter(tmp_path, META, rows_per_shard=4), []

    def feed():
        for batch in images:
            writer.add(batch)
            added.append(batch)

    feeding = threading.Thread(target=feed)
    feeding.start()
    assert stalled.wait(PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while len(added) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    feeding.join(0.3)  # the fourth fills the second shard, and waits there until the first is written
    assert feeding.is_alive()
    assert len(added) == 3
    assert not list(tmp_path.glob("shard-*"))
    works.set()
    feeding.join(PATIENCE)
    writer.flush()
    write_ezhoi_tensors(tmp_path, {"text": torch.randn(7, D)})
    store = finish_store(tmp_path)
    assert [shard["rows"] for shard in store.index["shards"]] == [4] * 6
    assert torch.equal(store.adapter_feat(), torch.cat([b.adapter_feat for b in images]))


def test_a_disk_that_refuses_in_the_thread_is_raised_to_the_pass_and_nothing_is_written_after_it(tmp_path, monkeypatch):
    whole = write(tmp_path / "whole", rows_per_shard=2)
    assert len(whole.index["shards"]) == 4
    files, real = [], os.fsync

    def fsync(handle):
        if is_shard(handle):
            files.append(handle)
            if len(files) == 3:  # a shard is two files
                raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    writer = FeatureWriter(tmp_path / "cut", META, rows_per_shard=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(FeatureStoreError, match=r"could not take shard-000-00001 .*No space left on device"):
            add_all(writer, IMAGES)
        for again in (lambda: writer.add(IMAGES[5]), writer.flush, writer.close):
            with pytest.raises(FeatureStoreError, match="No space left on device"):
                again()
    assert [path.name for path in sorted((tmp_path / "cut").glob("*shard-*"))] == [
        "shard-000-00000.json",
        "shard-000-00000.safetensors",
    ]
    again = FeatureWriter(tmp_path / "cut", META)
    assert again.next_index == 1
    again.close()
    store = write(tmp_path / "cut", rows_per_shard=2)
    assert [store.index["shards"], shard_bytes(store)] == [whole.index["shards"], shard_bytes(whole)]


def test_nothing_is_added_after_the_end(tmp_path):
    writer = FeatureWriter(tmp_path / "store", META)
    writer.close()
    with pytest.raises(FeatureStoreError, match="after the capture was closed"):
        writer.add(IMAGES[0])


def test_close_ends_what_is_being_written_and_says_what_went_wrong(tmp_path, monkeypatch):
    def fsync(handle):
        if is_shard(handle):
            raise OSError(errno.EIO, "Input/output error")

    writer = FeatureWriter(tmp_path, META, rows_per_shard=1)
    monkeypatch.setattr(os, "fsync", fsync)
    writer.add(IMAGES[0])
    with pytest.raises(FeatureStoreError, match="Input/output error"):
        writer.close()
    assert not list(tmp_path.glob(".lock*"))


@pytest.mark.parametrize(("room", "rows"), [(0, [2, 3, 0, 9, 1, 4, 12, 1]), (2, [5, 0, 9, 5, 12, 1])])
def test_an_image_that_does_not_fit_begins_a_shard(tmp_path, monkeypatch, room, rows):
    monkeypatch.setattr(shard_module, "MAX_IMAGE_PAIRS", room)
    images = [image(i, pairs) for i, pairs in enumerate([2, 3, 0, 9, 1, 4, 12, 1])]
    store = write(tmp_path, images, rows_per_shard=3)
    assert torch.equal(store.adapter_feat(), torch.cat([b.adapter_feat for b in images]))
    assert torch.equal(store.rows("labels"), torch.cat([b.labels for b in images]))
    assert [shard["rows"] for shard in store.index["shards"]] == rows


def test_copies_from_a_gpu_are_waited_for_before_they_are_looked_at(tmp_path, monkeypatch):
    """The order of the calls alone: there is no GPU here."""
    calls = []

    class OnGPU(torch.Tensor):
        is_cuda = True

        def to(self, device, *, copy, non_blocking):
            calls.append(("to", non_blocking))
            return self.as_subclass(torch.Tensor).clone()

    class Event:
        def __init__(self, *, blocking):
            assert blocking

        def record(self, stream):
            calls.append(("record", stream))

        def synchronize(self):
            calls.append(("synchronize", threading.current_thread() is threading.main_thread()))

    def empty(*shape, pin_memory, real=torch.empty, **kwargs):
        calls.append(("pinned", pin_memory))
        return real(*shape, **kwargs)

    def looked(batch, real=shard_module._problem):
        calls.append(("looked", batch.index))
        return real(batch)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the default")
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(shard_module, "_problem", looked)

    def there(batch):
        pairs = {
            k: getattr(batch.pairs, k).as_subclass(OnGPU) for k in ("size", "boxes", "scores", "classes", "pairing")
        }
        own = {
            k: getattr(batch, k).as_subclass(OnGPU) for k in ("adapter_feat", "logits", "labels", "gt_boxes", "gt_hoi")
        }
        return replace(batch, pairs=replace(batch.pairs, **pairs), **own)

    store = write(tmp_path, [there(batch) for batch in IMAGES[:2]])
    copies = [("to", True)] * 7
    assert calls == [
        *copies, *[("pinned", True)] * 3, ("record", "the default"), *copies, ("record", "the default"),
        ("synchronize", False), ("looked", 0), ("looked", 1),
    ]  # fmt: skip
    assert torch.equal(store.adapter_feat(), IMAGES[0].adapter_feat)


# -- files -------------------------------------------------------------------------------------------------------------


def test_json_is_readable_and_ends_with_its_checksum():
    value = {"a": [1, 2.5, None, "ü"], "b": {"c": [], "d": {}}}
    found = json.loads(json_bytes(value))
    assert list(found) == ["a", "b", "checksum"]
    assert json_bytes(value) == (json.dumps(found, indent=2) + "\n").encode()


def test_no_byte_of_a_json_may_change(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": [1, 2.5, None, "ü"], "b": {}})
    data = path.read_bytes()
    changed = [data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] for place in range(len(data))]
    for content in (*changed, data + b"\n", data[:-1], b" " + data, b"{}", b'{"checksum": ""}'):
        path.write_bytes(content)
        with pytest.raises(FeatureStoreError, match=r"file\.json"):
            read_json(path, dict, FeatureStoreError, "")
    path.write_bytes(data)
    assert read_json(path, dict, FeatureStoreError, "") == {"a": [1, 2.5, None, "ü"], "b": {}}

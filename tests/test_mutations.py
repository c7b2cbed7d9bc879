"""Damaged and wrong files at the entry points of users: one typed error that names the file, or no effect.

Every case asserts that the damage is not accepted, that the message names the file and is no traceback, and that nothing
that was there has changed.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ezhoi_diffusion.builtin import mean_shift
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.diffusion.bridge import BridgeError, DiffusionBridge
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.store import FeatureStore, FeatureStoreError
from ezhoi_diffusion.features.writer import FeatureWriter
from ezhoi_diffusion.files import read_json, write_tensors
from helpers.miniature import rewrite
from helpers.stores import IMAGES, META, D, write
from helpers.trainings import equal, weights

QUICK = [
    "--batch-size", "8", "--val-every", "3", "--checkpoint-every", "2", "--denoiser-options", '{"width": 16, "depth": 1}',
]  # fmt: skip


# -- damage to bytes -----------------------------------------------------------------------------------------------


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def flip_last(path, chance):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def zero_a_block(path, chance):
    data, at = bytearray(path.read_bytes()), chance.randrange(len(path.read_bytes()) - 16)
    data[at : at + 16] = bytes(16) if data[at : at + 16] != bytes(16) else b"\1" * 16
    path.write_bytes(data)


def cut(path, chance):
    os.truncate(path, chance.randrange(1, path.stat().st_size))


def cut_one(path, chance):
    os.truncate(path, path.stat().st_size - 1)


def empty(path, chance):
    path.write_bytes(b"")


def append_space(path, chance):
    path.write_bytes(path.read_bytes() + b" ")


def append_itself(path, chance):
    path.write_bytes(path.read_bytes() * 2)


def terabyte(path, chance):
    os.truncate(path, 1 << 40)  # sparse: takes no room, and would take all memory


def garbage(path, chance):
    path.write_bytes(chance.randbytes(path.stat().st_size))


def header_of_terabytes(path, chance):
    path.write_bytes(struct.pack("<Q", 1 << 42) + path.read_bytes()[8:])


def deep_json(path, chance):
    path.write_bytes(b'{"a":' * 100_000)


def pickle(path, chance):
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch executed'\ntR.")


def delete(path, chance):
    path.unlink()


def folder(path, chance):
    path.unlink()
    path.mkdir()


def dangling(path, chance):
    path.unlink()
    path.symlink_to("nowhere")


def loop(path, chance):
    path.unlink()
    path.symlink_to(path)


def pipe(path, chance):
    path.unlink()
    os.mkfifo(path)


def swap(path, chance):
    other = chance.choice([p for p in sorted(path.parent.iterdir()) if p.is_file() and p.name != path.name])
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


DAMAGES = [
    *[flip] * 3, flip_last, zero_a_block, cut, cut_one, empty, append_space, append_itself, terabyte, garbage,
    header_of_terabytes, deep_json, pickle, delete, folder, dangling, loop, pipe, swap,
]  # fmt: skip
SHARDS = ["shard-000-00000.safetensors", "shard-000-00001.safetensors"]
IN_STORE = ["meta.json", "index.json", "ezhoi.safetensors", *SHARDS]
IN_CAPTURE = ["meta.json", "ezhoi.json", "ezhoi.safetensors", SHARDS[0], SHARDS[0].replace("safetensors", "json")]
IN_BRIDGE = ["config.json", "model.safetensors", "statistics.safetensors", "context.safetensors"]
IN_CHECKPOINT = ["manifest.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors"]


@dataclass
class Made:
    store: Path
    other: Path
    captured: Path  # unfinished
    bridge: Path
    longer: Path  # the bridge after two more steps, never interrupted


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    write(folder / "store", rows_per_shard=4)
    write(folder / "other", IMAGES[:3], rows_per_shard=4)
    writer = FeatureWriter(folder / "captured", META, rows_per_shard=4)
    writer.keep_ezhoi_tensors(FeatureStore(folder / "store").ezhoi)
    for batch in IMAGES:
        writer.add(batch)
    writer.flush()
    writer.close()
    for name, steps in (("bridge", "6"), ("longer", "8")):
        assert main(["train", str(folder / "store"), "--out", str(folder / name), "--train-steps", steps, *QUICK]) == 0
    return Made(*(folder / name for name in ("store", "other", "captured", "bridge", "longer")))


def tree(folder: Path) -> dict[str, tuple]:
    """Every entry below a folder; to write the same again is a change, too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        s = path.lstat()
        found[str(path)] = (s.st_mode, s.st_ino) if path.is_dir() else (s.st_mode, s.st_ino, s.st_size, s.st_mtime_ns)
    return found


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def refused_by_main(argv: list[str], said, *names: str) -> None:
    """Status 2, a message that names the file, no traceback. Progress bars may come before it."""
    assert main(argv) == 2
    message = re.sub(r"\r(search|refit), phase[^\n]*\n?", "", said.readouterr().err)
    assert message.startswith("ezhoi-diffusion: error: ")
    assert "Traceback" not in message
    assert any(name in message for name in names), message


def damaged(path: Path, damage, number: int) -> None:
    before = path.read_bytes()
    damage(path, random.Random(f"{path.name} {number}"))
    if path.is_file() and path.stat().st_size < 1 << 30:
        assert path.read_bytes() != before, "the damage must be one"


def cases(names):
    return [pytest.param(n, d, i, id=f"{n}-{d.__name__}-{i}") for n in names for i, d in enumerate(DAMAGES)]


@pytest.mark.parametrize(("name", "damage", "number"), cases(IN_STORE))
def test_a_damaged_store(made, tmp_path, capsys, name, damage, number):
    store = copied(made.store, tmp_path / "store")
    damaged(store / name, damage, number)
    before = tree(tmp_path)
    named = IN_STORE if damage is swap else [name, str(store)]
    refused_by_main(["train", str(store), "--out", str(tmp_path / "out"), *QUICK], capsys, *named)
    assert tree(tmp_path) == before
    with pytest.raises(FeatureStoreError):
        FeatureStore(store).adapter_feat()


@pytest.mark.parametrize(("name", "damage", "number"), cases(IN_BRIDGE))
def test_a_damaged_bridge(made, tmp_path, name, damage, number):
    bridge = copied(made.bridge, tmp_path / "bridge")
    damaged(bridge / name, damage, number)
    before = tree(tmp_path)
    for load in (DiffusionBridge.from_pretrained, mean_shift.load):
        with pytest.raises(BridgeError) as error:
            load(bridge)
        assert any(n in str(error.value) for n in ([name] if damage is not swap else [*IN_BRIDGE, "training"]))
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("name", "damage", "number"), cases(IN_CAPTURE))
def test_a_damaged_capture_does_not_go_on(made, tmp_path, name, damage, number):
    if damage is delete and name.endswith(".json") and name != "meta.json":
        pytest.skip("without its entry a file does not count, and is written again")
    captured = copied(made.captured, tmp_path / "captured")
    damaged(captured / name, damage, number)
    before = tree(tmp_path)
    with pytest.raises(FeatureStoreError, match=r"meta|ezhoi|shard|capture"):
        FeatureWriter(captured, META).keep_ezhoi_tensors({"text": torch.ones(1, D)})
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("name", "damage", "number"), cases(IN_CHECKPOINT))
def test_a_damaged_checkpoint(made, tmp_path, capsys, name, damage, number):
    """The newest is skipped with a warning and the one before taken; without that one it is an error."""
    bridge = copied(made.bridge, tmp_path / "bridge")
    older, newest = sorted((bridge / "checkpoints").glob("step-*"))
    damaged(newest / name, damage, number)
    argv = ["train", str(made.store), "--out", str(bridge), "--resume", "--train-steps", "8", *QUICK]
    if number % 3 == 0:
        with pytest.warns(UserWarning, match=f"skipping checkpoint {newest}"):
            assert main(argv) == 0
        assert equal(weights(bridge), weights(made.longer))
        return
    shutil.rmtree(older)
    before = tree(tmp_path)
    with pytest.warns(UserWarning, match=f"skipping checkpoint {newest}"):
        refused_by_main(argv, capsys, "has no complete checkpoint to resume from")
    assert tree(tmp_path) == before


# -- wrong content under valid checksums --------------------------------------------------------------------------------------


def change(path: Path, **changes) -> None:
    """A safetensors file written again with other tensors; a function changes the one there, None deletes it."""
    tensors = load_file(path)
    for name, value in changes.items():
        name = name.replace("__", "/")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name].clone()) if callable(value) else value
    facts = write_tensors(path, tensors)
    renew_checksums(path, facts)


def renew_checksums(path: Path, facts=None) -> None:
    """Let the JSON beside a file say what the file is now."""
    data = path.read_bytes()
    facts = facts or {"file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if (index := path.parent / "index.json").exists():
        content = read_json(index, dict, EzhoiDiffusionError, "")
        if path.name == "ezhoi.safetensors":
            rewrite(index, ezhoi=facts)
        else:
            rewrite(index, shards=[{**s, **facts} if s["file"] == path.name else s for s in content["shards"]])
        return
    index, key = (path.parent / "manifest.json", path.stem) if path.parent.name.startswith("step") else (path.parent / "config.json", path.name)  # fmt: skip
    files = read_json(index, dict, EzhoiDiffusionError, "")["files"]
    rewrite(index, files={**files, key: facts})


def put(value, *where):
    def at(x):
        x[where] = value
        return x

    return at


def meta(store: Path, **changes) -> None:
    rewrite(store / "meta.json", **changes)
    rewrite(store / "index.json", meta=read_json(store / "meta.json", dict, EzhoiDiffusionError, ""))


def shards(store: Path, **changes) -> None:
    found = read_json(store / "index.json", dict, EzhoiDiffusionError, "")["shards"]
    rewrite(store / "index.json", shards=[{**found[0], **changes}, *found[1:]])


def images(store: Path, **changes) -> None:
    found = read_json(store / "index.json", dict, EzhoiDiffusionError, "")["shards"][0]["images"]
    shards(store, images=[{**found[0], **changes}, *found[1:]])


def rows(**changes):
    return lambda store: change(store / SHARDS[1], **changes)


def ezhoi(**changes):
    return lambda store: change(store / "ezhoi.safetensors", **changes)


def terabytes_claimed(name):
    def damage(folder):
        path = folder / name
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = b'{"text":{"dtype":"F32","shape":[1099511627776,4],"data_offsets":[0,17592186044416]}}'
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
        renew_checksums(path)

    return damage


WRONG_STORES = {
    "NaN in a row": (rows(adapter_feat=put(torch.nan, 1, 2)), SHARDS[1]),
    "infinity in a row": (rows(adapter_feat=put(torch.inf, 0, 0)), SHARDS[1]),
    "NaN in the boxes": (rows(boxes=put(torch.nan, 0, 0)), SHARDS[1]),
    "rows of another width": (rows(adapter_feat=lambda x: x[:, :8]), "adapter_feat"),
    "fewer rows": (rows(adapter_feat=lambda x: x[1:]), "adapter_feat"),
    "more rows": (rows(adapter_feat=lambda x: torch.cat([x, x])), "adapter_feat"),
    "rows of three dimensions": (rows(adapter_feat=lambda x: x[None]), "adapter_feat"),
    "half precision": (rows(adapter_feat=lambda x: x.half()), "adapter_feat"),
    "double precision": (rows(adapter_feat=lambda x: x.double()), "adapter_feat"),
    "no rows at all": (rows(adapter_feat=None), "it lacks adapter_feat"),
    "no labels": (rows(labels=None), "it lacks labels"),
    "a tensor too many": (rows(mine=torch.ones(1)), "mine"),
    "labels that are numbers": (rows(labels=lambda x: x.float()), "labels"),
    "labels of fewer rows": (rows(labels=lambda x: x[1:]), "labels"),
    "pairing beyond the boxes": (rows(pairing=put(99, 0, 0)), "pairing"),
    "pairing below zero": (rows(pairing=put(-1, 0, 1)), "pairing"),
    "pairing of one column": (rows(pairing=lambda x: x[:, :1]), "pairing"),
    "fewer boxes": (rows(boxes=lambda x: x[1:]), "boxes"),
    "other annotations": (rows(gt_hoi=lambda x: x[1:]), "gt_hoi"),
    "boxes that end before they begin": (rows(boxes=lambda x: x.flip(1)), "end before they begin"),
    "annotated boxes that end before they begin": (rows(gt_boxes=lambda x: x.flip(2)), "end before they begin"),
    "boxes of the size of a galaxy": (rows(boxes=put(1e20, 0, 2)), "boxes has values"),
    "scores above 1": (rows(scores=put(1.5, 0)), "scores has values"),
    "object classes below zero": (rows(objects=put(-1, 0)), "objects has values"),
    "an image of no size": (rows(sizes=put(0, 0, 0)), "sizes has values"),
    "NaN in the text": (ezhoi(text=put(torch.nan, 0, 0)), "ezhoi.safetensors"),
    "text of another width": (ezhoi(text=lambda x: x[:, :8].contiguous()), "adapter_feat"),
    "text of no row": (ezhoi(text=lambda x: x[:0]), "text"),
    "text of one dimension": (ezhoi(text=lambda x: x[0]), "text"),
    "text in half precision": (ezhoi(text=lambda x: x.half()), "text"),
    "no text": (ezhoi(text=None), "ezhoi.safetensors"),
    "a header of terabytes in the text": (terabytes_claimed("ezhoi.safetensors"), "ezhoi.safetensors"),
    "a header of terabytes in a shard": (terabytes_claimed(SHARDS[0]), SHARDS[0]),
    "the test split": (lambda s: meta(s, split="test"), "test split"),
    "a split nobody knows": (lambda s: meta(s, split="validation"), "split"),
    "no split": (lambda s: meta(s, split=None), "split"),
    "a fingerprint that is a number": (lambda s: meta(s, fingerprint=3), "fingerprint"),
    "a meta of another capture": (lambda s: rewrite(s / "meta.json", max_images=3), "meta.json"),
    "a schema of the future": (lambda s: rewrite(s / "index.json", schema=99), "$.schema"),
    "no shards": (lambda s: rewrite(s / "index.json", shards=[], rows=0, images=0), "index.json has a wrong entry"),
    "shards that are a text": (lambda s: rewrite(s / "index.json", shards="all"), "$.shards"),
    "one shard twice": (
        lambda s: rewrite(s / "index.json", shards=read_json(s / "index.json", dict, EzhoiDiffusionError, "")["shards"][:1] * 2),
        "images",
    ),
    "a shard elsewhere": (lambda s: shards(s, file="../secret.safetensors"), "$.shards[0].file"),
    "a shard of -1 bytes": (lambda s: shards(s, bytes=-1), "$.shards[0].bytes"),
    "a shard without a hash": (lambda s: shards(s, sha256=None), "$.shards[0].sha256"),
    "a shard without images": (lambda s: shards(s, images=[]), "$.shards[0].images"),
    "rows that do not add up": (lambda s: shards(s, rows=99), "has 99 rows, its images 8"),
    "rows below zero": (lambda s: images(s, rows=-3), "$.shards[0].images[0].rows"),
    "rows that are not whole": (lambda s: images(s, rows=3.0), "$.shards[0].images[0].rows"),
    "images too many for the file": (lambda s: images(s, boxes=2**40), "too few for"),
    "images in another order": (lambda s: images(s, index=5), "order"),
    "an image whose name is a list": (lambda s: images(s, name=["a"]), "name"),
    "the other store's text": (lambda s: shutil.copy(s.parent / "other" / "ezhoi.safetensors", s), "ezhoi.safetensors"),
    "the other store's index": (lambda s: shutil.copy(s.parent / "other" / "index.json", s), "ezhoi.safetensors"),
    "the other store's shard": (lambda s: shutil.copy(s / SHARDS[1], s / SHARDS[0]), SHARDS[0]),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_STORES)
def test_a_store_with_a_right_checksum_and_wrong_contents(made, tmp_path, capsys, what):
    wrong, says = WRONG_STORES[what]
    store = copied(made.store, tmp_path / "store")
    copied(made.other, tmp_path / "other")
    wrong(store)
    before = tree(tmp_path)
    refused_by_main(["train", str(store), "--out", str(tmp_path / "out"), *QUICK], capsys, says)
    assert tree(tmp_path) == before


def weight(**changes):
    return lambda bridge: change(bridge / "model.safetensors", **changes)


def statistic(**changes):
    return lambda bridge: change(bridge / "statistics.safetensors", **changes)


WRONG_BRIDGES = {
    "a mean of NaN": statistic(visual_mean=put(torch.nan, 0)),
    "a mean of another width": statistic(visual_mean=lambda x: x[:3]),
    "a mean of two dimensions": statistic(text_mean=lambda x: x[None]),
    "a mean longer than 1": statistic(text_mean=lambda x: x + 9),
    "a mean in half precision": statistic(text_mean=lambda x: x.half()),
    "no text mean": statistic(text_mean=None),
    "no counts": statistic(rows=None),
    "one count": statistic(rows=torch.tensor([1])),
    "a count for a number": statistic(rows=torch.tensor(3)),
    "a weight too many": weight(mine=torch.ones(2)),
    "a header of terabytes": terabytes_claimed("model.safetensors"),
    "a width of millions": lambda b: rewrite(b / "config.json", denoiser_options={"width": 10_000_000, "depth": 1}),
    "a depth below zero": lambda b: rewrite(b / "config.json", denoiser_options={"width": 16, "depth": -1}),
    "dim as a text": lambda b: rewrite(b / "config.json", dim="16"),
    "options as a list": lambda b: rewrite(b / "config.json", denoiser_options=[1]),
    "a context elsewhere": lambda b: rewrite(b / "config.json", files={"../x": {"bytes": 1, "sha256": ""}}),
    "files as a list": lambda b: rewrite(b / "config.json", files=["model.safetensors"]),
    "a provenance that is a number": lambda b: rewrite(b / "config.json", provenance=7),
}


@pytest.mark.parametrize("what", WRONG_BRIDGES)
def test_a_bridge_with_a_right_checksum_and_wrong_contents(made, tmp_path, what):
    bridge = copied(made.bridge, tmp_path / "bridge")
    WRONG_BRIDGES[what](bridge)
    before = tree(tmp_path)
    with pytest.raises(BridgeError, match=str(bridge)):
        DiffusionBridge.from_pretrained(bridge)
    assert tree(tmp_path) == before


def state(checkpoint: Path, **changes) -> None:
    found = read_json(checkpoint / "manifest.json", dict, EzhoiDiffusionError, "")["state"]
    rewrite(checkpoint / "manifest.json", state={k: v for k, v in {**found, **changes}.items() if v is not ...})


WRONG_CHECKPOINTS = {
    "NaN in the weights": lambda c: change(c / "ema.safetensors", mine=torch.full((2,), torch.nan)),
    "of another step": lambda c: state(c, step=4),
    "no step": lambda c: state(c, step=...),
    "no files": lambda c: rewrite(c / "manifest.json", files={}),
    "files that are a list": lambda c: rewrite(c / "manifest.json", files=["model"]),
    "facts that are a text": lambda c: rewrite(c / "manifest.json", files={"model": "whole"}),
    "no state": lambda c: rewrite(c / "manifest.json", state=None),
    "no history": lambda c: state(c, history=...),
    "no configuration": lambda c: state(c, config=...),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_CHECKPOINTS)
def test_a_checkpoint_with_a_right_checksum_and_wrong_contents_is_skipped(made, tmp_path, what):
    bridge = copied(made.bridge, tmp_path / "bridge")
    newest = max((bridge / "checkpoints").glob("step-*"))
    WRONG_CHECKPOINTS[what](newest)
    with pytest.warns(UserWarning, match=f"skipping checkpoint {newest}"):
        assert main(["train", str(made.store), "--out", str(bridge), "--resume", "--train-steps", "8", *QUICK]) == 0
    assert equal(weights(bridge), weights(made.longer))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda c: state(c, data_sha256="other"), "other features"),
        (lambda c: change(c / "model.safetensors", mine=torch.ones(3)), "mine"),
        (lambda c: change(c / "optimizer.safetensors", mine=torch.ones(3)), "checkpoint"),
    ],
)
def test_a_whole_checkpoint_of_something_else_is_refused(made, tmp_path, capsys, wrong, says):
    bridge = copied(made.bridge, tmp_path / "bridge")
    wrong(max((bridge / "checkpoints").glob("step-*")))
    before = tree(tmp_path)
    refused_by_main(
        ["train", str(made.store), "--out", str(bridge), "--resume", "--train-steps", "8", *QUICK], capsys, says
    )
    assert tree(tmp_path) == before


# -- a disk that refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 3_000, 9_000, 30_000])
def test_a_full_disk_harms_nothing_and_the_same_command_goes_on(made, tmp_path, capsys, monkeypatch, room):
    """Let the disk take this many bytes in all. The write fails when a file is flushed, half-written."""
    import errno
    import stat

    left, real = [room], os.fsync

    def fsync(handle):
        found = os.fstat(handle)
        if stat.S_ISREG(found.st_mode):
            left[0] -= found.st_size
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    out = tmp_path / "out"
    argv = ["train", str(made.store), "--out", str(out), "--train-steps", "8", "--resume", *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        refused_by_main(argv, capsys, "No space left on device")
    assert not [p for p in out.rglob("*") if p.name.endswith((".tmp", ".staged"))]
    assert main(argv) == 0
    assert equal(weights(out), weights(made.longer))

    left[0] = room
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(FeatureStoreError, match="No space left on device"):
            write_all(tmp_path / "features")
    assert not list((tmp_path / "features").glob(".*.tmp"))
    assert torch.equal(write_all(tmp_path / "features"), FeatureStore(made.store).adapter_feat())


def write_all(folder: Path) -> torch.Tensor:
    from ezhoi_diffusion.features.writer import finish_store

    writer = FeatureWriter(folder, META, rows_per_shard=1)
    writer.keep_ezhoi_tensors({"text": torch.ones(7, D), "context/more": torch.ones(9_000)})
    for batch in IMAGES:
        writer.add(batch)
    writer.flush()
    return finish_store(folder).adapter_feat()


def test_a_path_below_a_file_is_a_typed_error(made, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    below = str(tmp_path / "file" / "below")
    refused_by_main(["train", str(made.store), "--out", below, *QUICK], capsys, "cannot be written")
    refused_by_main(["train", below, "--out", str(tmp_path / "out"), *QUICK], capsys, below)
    with pytest.raises(FeatureStoreError, match="cannot be written"):
        FeatureWriter(Path(below), META)
    with pytest.raises(BridgeError, match="could not take the bridge"):
        DiffusionBridge.from_pretrained(made.bridge).save_pretrained(below)
    assert (tmp_path / "file").read_text() == "mine"


def test_there_are_hundreds_of_them():
    assert len(DAMAGES) * len(IN_STORE + IN_BRIDGE + IN_CAPTURE + IN_CHECKPOINT) >= 300

"""Every state in which a power cut may leave a folder is read: nothing that was promised is lost, and the same work goes on."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.comparison import Comparison, VariantResult
from ezhoi_diffusion.features.store import EZHOI, INDEX, FeatureStore
from ezhoi_diffusion.features.store import META as META_FILE
from ezhoi_diffusion.features.writer import FeatureWriter, clear_finished, finish_store
from ezhoi_diffusion.files import current, make_folder, new_folder, new_result, put_back, read_json, write_atomic
from ezhoi_diffusion.pipeline.record import Step
from ezhoi_diffusion.pipeline.run import run_steps
from ezhoi_diffusion.report.write import write_report
from ezhoi_diffusion.training.checkpoint import read_newest
from ezhoi_diffusion.training.trainer import train
from helpers.disk import Disk, crash_states, rebuild, watched
from helpers.stores import META, D, image
from helpers.trainings import QUICK, equal, low_rank, weights

VERSIONS = [bytes([65 + number]) * (3000 + number) for number in range(3)]


def try_all(
    work: Callable[[Path, Disk], None], check: Callable[[Path, list[Any]], None], tmp_path: Path, stride: int = 1
) -> int:
    """Let `work` be watched in a folder, and `check` each state with what was promised before. Returns their number."""
    live = tmp_path / "live"
    live.mkdir(parents=True)
    with watched(live) as disk:
        work(live, disk)
    count = 0
    for number, (state, promised) in enumerate(crash_states(disk, random.Random(0))):
        if number % stride:
            continue
        folder = tmp_path / "after"
        rebuild(state, folder)
        try:
            check(folder, promised)
        except BaseException as error:
            raise AssertionError(f"after {promised[-1:]} state {number} is {sorted(state)}") from error
        shutil.rmtree(folder)
        count += 1
    print(f"{len(disk.log)} changes, {count} states")
    return count


def newest(promised: list[Any], found: bytes | None) -> None:
    """What is found is the version that was promised last, or a later one."""
    assert found in ([None, *VERSIONS] if not promised else VERSIONS[promised[-1] :])


def test_the_replay_knows_the_two_classic_faults(tmp_path):
    """A rename before the data are flushed, and an entry that nobody flushes."""

    def work(root, disk):
        (root / "new").write_bytes(b"whole")
        if flush:
            with (root / "new").open("rb") as file:
                os.fsync(file.fileno())
        (root / "new").rename(root / "file")
        disk.promise("stored")

    for flush in (False, True):
        found = set()

        def check(root, promised, found=found):
            if promised:
                found.add((root / "file").read_bytes() if (root / "file").exists() else None)

        try_all(work, check, tmp_path / str(flush))
        assert found == {None, b"whole"} | (set() if flush else {b"", b"wh", bytes(5)})


def test_a_file(tmp_path):
    def work(root, disk):
        for number, version in enumerate(VERSIONS):
            write_atomic(root / "file", version)
            disk.promise(number)

    def check(root, promised):
        path = root / "file"
        newest(promised, path.read_bytes() if path.exists() else None)

    assert try_all(work, check, tmp_path) >= 19


def replace_folder(out: Path, version: bytes) -> None:
    with new_folder(out) as staged:
        (staged / "inside").mkdir()
        (staged / "inside" / "plain").write_bytes(version)  # as a copy or somebody else's library writes
        write_atomic(staged / "file", version)


def check_folder(root: Path, promised: list[Any]) -> None:
    out = root / "new" / "out"
    put_back(out)
    found = [path.read_bytes() if path.exists() else None for path in (out / "file", out / "inside" / "plain")]
    assert found[0] == found[1]
    newest(promised, found[0])
    replace_folder(out, b"last")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_folder(tmp_path):
    def work(root, disk):
        for number, version in enumerate(VERSIONS):
            replace_folder(root / "new" / "out", version)
            disk.promise(number)

    assert try_all(work, check_folder, tmp_path) > 40


def test_a_folder_whose_writer_was_killed_before(tmp_path):
    alive: list[bool] = []
    for call in itertools.count(0, 4):

        def work(root, disk, call=call):
            out = root / "new" / "out"
            replace_folder(out, VERSIONS[0])
            disk.promise(0)
            with disk.dying(call):
                replace_folder(out, VERSIONS[1])
                disk.promise(1)
            replace_folder(out, VERSIONS[2])
            disk.promise(2)

            alive.append(not disk.deaths)

        try_all(work, check_folder, tmp_path / str(call))
        if alive[-1]:
            break
    assert call > 10


def test_a_result(tmp_path):
    def write(root):
        with new_result(root / "new" / "out", EzhoiDiffusionError) as staged:
            artifact(0).save(staged)

    def work(root, disk):
        write(root)
        disk.promise(0)

    def check(root, promised):
        out = root / "new" / "out"
        if not out.exists() and not promised:
            write(root)
            assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert Artifact.load(out).config == {"version": 0}

    assert try_all(work, check, tmp_path) > 20


def artifact(version: int) -> Artifact:
    tensors = torch.full((40,), float(version))
    return Artifact("mine", {"version": version}, {"a.safetensors": {"x": tensors}, "b.safetensors": {"x": tensors}})


def test_a_bridge_over_an_older_one(tmp_path):
    def work(root, disk):
        for version in range(2):
            artifact(version).save(root / "new" / "out")
            disk.promise(version)

    def check(root, promised):
        out = root / "new" / "out"
        try:
            found = Artifact.load(out)
        except EzhoiDiffusionError:
            assert not promised
        else:
            version = found.config["version"]
            assert version >= len(promised) - 1
            assert all(bool((file["x"] == version).all()) for file in found.files.values())
        artifact(2).save(out)
        assert Artifact.load(out).config == {"version": 2}
        assert sorted(path.name for path in out.iterdir()) == ["a.safetensors", "b.safetensors", "config.json"]

    assert try_all(work, check, tmp_path) > 40


# -- capture, training, pipeline, report ---------------------------------------------------------------------------------

PAIRS = [3, 0, 5, 2]
TEXT = torch.randn(7, D, generator=torch.Generator().manual_seed(0))


def capture(root: Path, disk: Disk | None = None) -> FeatureStore:
    """What the capture plugin does; it is promised each image whose shard is stored."""
    writer = FeatureWriter(root / "new" / "features", META)
    try:
        for index in range(writer.next_index, len(PAIRS)):
            writer.keep_ezhoi_tensors({"text": TEXT, "context/ctx.0": torch.ones(2)})
            writer.add(image(index, PAIRS[index]))
            writer.flush()
            if disk:
                disk.promise(index + 1)
        store = finish_store(writer.folder)
        if disk:
            disk.promise("finished")
    finally:
        writer.close()
    return store


def tensors_of(store: FeatureStore) -> dict[str, torch.Tensor]:
    return {name: store.rows(name) for name in ("adapter_feat", "labels", "pairing", "boxes", "gt_boxes")} | store.ezhoi


def test_a_capture(tmp_path):
    reference = tensors_of(capture(tmp_path))

    def check(root, promised):
        folder = root / "new" / "features"
        if "finished" in promised:
            FeatureStore(folder)
        if (folder / INDEX).exists():
            store = FeatureStore(folder)
            clear_finished(folder)
        else:
            writer = FeatureWriter(folder, META)
            begun = writer.next_index
            writer.close()
            assert begun >= (promised[-1] if promised else 0)
            store = capture(root)
        assert equal(tensors_of(store), reference)
        listed = {path.name for path in folder.iterdir()}
        assert listed == {META_FILE, INDEX, EZHOI, *(shard["file"] for shard in store.index["shards"])}

    assert try_all(capture, check, tmp_path) > 70


SAVING = replace(QUICK, train_steps=4, checkpoint_every=1, val_every=2)


@pytest.mark.slow
def test_a_training(tmp_path):
    def work(root, disk):
        out = root / "new" / "out"
        train(low_rank(), SAVING, out, on_step=disk.promise)
        disk.promise("finished")

    train(low_rank(), SAVING, tmp_path / "whole")
    reference, model = weights(tmp_path / "whole"), load_file(tmp_path / "whole" / "model.safetensors")

    def check(root, promised):
        out = root / "new" / "out"
        if "finished" in promised:
            assert equal(model, load_file(out / "model.safetensors"))
        elif promised:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a checkpoint of which a part is there
                phases = [read_newest(out / "checkpoints" / phase) for phase in (".", "refit")]
            assert sum(found[1]["step"] for found in phases if found) >= promised[-1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(low_rank(), SAVING, out, resume=True)
        assert equal(weights(out), reference)
        left = {
            path.name for path in out.rglob("*") if path.name.startswith(".") or path.suffix in (".staged", ".replaced")
        }
        assert not left
        tensors = {f"{name}.safetensors" for name in ("model", "statistics", "context")}
        assert {path.name for path in out.iterdir()} == tensors | {"config.json", "training.json", "checkpoints"}

    assert try_all(work, check, tmp_path, stride=6) > 50


def test_a_pipeline(tmp_path, monkeypatch, capsys):
    """Two runs; the second has another input, so that the finished result of the first is kept aside meanwhile."""
    ran: list[str] = []

    def run(command):
        ran.append(command[0])
        folder = Path(command[1])
        make_folder(folder)
        write_atomic(folder / "result", command[2].encode())

    monkeypatch.setattr("ezhoi_diffusion.pipeline.run._run", run)

    def steps(out, text):
        first = Step("a", "first", out / "a", ["a", str(out / "a"), text], {"text": text})
        return [first, Step("b", "second", out / "b", ["b", str(out / "b"), text], {}, ["a"])]

    def work(root, disk):
        for text in ("x", "y"):
            run_steps(steps(root / "new" / "out", text), root / "new" / "out")
            disk.promise(text)

    def check(root, promised):
        out = root / "new" / "out"
        again = {(): ["y"], ("x",): ["x", "y"], ("x", "y"): ["y"]}[tuple(promised)]
        for text in again:
            ran.clear()
            run_steps(steps(out, text), out)
            if promised == ["x", "y"]:
                assert not ran
            assert [(out / name / "result").read_text() for name in "ab"] == [text, text]
            assert {path.name for path in out.iterdir()} == {"a", "b", "pipeline.json"}

    assert try_all(work, check, tmp_path) > 60


def test_a_report(tmp_path, mocker, capsys):
    """A report with pictures, and over it one without."""
    from PIL import Image

    comparison = Comparison(
        {name: VariantResult(name, torch.tensor([0.5, value])) for name, value in (("none", 0.5), ("scale", 0.6))},
        {"full": torch.arange(2)}, 3, 40, torch.tensor([5, 7]), {},
    )  # fmt: skip
    drawn = mocker.patch("ezhoi_diffusion.report.figures.pictures")
    mocker.patch("ezhoi_diffusion.report.figures.render", return_value=Image.new("RGB", (4, 4)))
    panels = {"comparison": [SimpleNamespace(alt="bars")]}

    def write(out, version):
        drawn.return_value = {} if version else panels
        write_report(comparison, out, [f"version {version}"])

    def work(root, disk):
        for version in range(2):
            write(root / "new" / "out", version)
            disk.promise(version)

    def check(root, promised):
        out = root / "new" / "out"
        page, facts, picture = (current(out, name) for name in ("report.html", "report.json", "comparison.png"))
        if promised or page.exists():
            version = int(read_json(facts, dict, EzhoiDiffusionError, "")["notes"][0][-1])
            assert version in range(promised[-1] if promised else 0, 2)
            assert f"version {version}" in page.read_text()
            assert not (version == 0 and not picture.exists()), "the old report has lost its picture"
        write(out, 1)
        assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json"]

    assert try_all(work, check, tmp_path) > 40

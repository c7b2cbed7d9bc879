"""Random histories of a capture: begun, abandoned, killed, cut off from power, damaged, finished and compared, in any order."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from ezhoi_diffusion.diffusion.baselines import Identity
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.replay import replay
from ezhoi_diffusion.evaluation.variants import Variant
from ezhoi_diffusion.features.store import EZHOI, INDEX, META, FeatureStore
from ezhoi_diffusion.features.writer import clear_finished
from ezhoi_diffusion.testing import synthetic_store
from helpers.disk import crash_states, rebuild, watched
from helpers.trainings import equal

IMAGES = 6
NAMES = ("adapter_feat", "labels", "logits", "pairing", "boxes", "scores", "classes", "sizes", "gt_boxes", "gt_hoi")


class Abandoned(Exception):
    """The run ends with an error of its own."""


def capture(folder: Path, images: int = IMAGES) -> FeatureStore:
    """Capture, or resume. A run that gets fewer images than it wants ends with Abandoned."""

    def stop(batch):
        if batch.index >= images:
            raise Abandoned
        return batch

    return synthetic_store(folder, images=IMAGES, split="test", dim=8, alter=stop)


def content(store: FeatureStore) -> dict[str, torch.Tensor]:
    return {name: store.rows(name) for name in NAMES} | store.ezhoi


def mean_ap(store: FeatureStore) -> dict[str, float]:
    comparison = replay(store, {"identity": Variant("identity", Identity())})
    return {name: comparison.mean_ap(name, "full") for name in comparison.variants}


class Histories(RuleBasedStateMachine):
    reference: dict[str, torch.Tensor]
    reference_ap: dict[str, float]

    def __init__(self) -> None:
        super().__init__()
        self.work = Path(tempfile.mkdtemp())
        self.folder = self.work / "features"
        self.numbers = iter(range(1000))
        self.entries: set[str] = set()  # complete shards that were seen

    @property
    def finished(self) -> bool:
        return (self.folder / INDEX).exists()

    def look(self) -> None:
        """No shard that was complete once may be gone, unless the index has it."""
        if self.finished:
            assert equal(content(FeatureStore(self.folder)), self.reference)
        else:
            entries = {path.name for path in self.folder.glob("shard-*.json")}
            assert self.entries <= entries
            self.entries = entries

    @precondition(lambda self: not self.finished)
    @rule(images=st.integers(0, IMAGES))
    def go_on(self, images):
        if images == IMAGES:
            assert equal(content(capture(self.folder)), self.reference)
        else:
            with pytest.raises(Abandoned):
                capture(self.folder, images)
        self.look()

    @precondition(lambda self: not self.finished)
    @rule(call=st.integers(0, 90))
    def kill(self, call):
        with watched(self.work) as disk, disk.dying(call):
            capture(self.folder)
        self.look()

    @precondition(lambda self: not self.finished)
    @rule(images=st.integers(1, IMAGES), number=st.integers(0, 10_000))
    def power_cut(self, images, number):
        with watched(self.work) as disk, contextlib.suppress(Abandoned):
            capture(self.folder, images)
        states = list(crash_states(disk, random.Random(number)))
        state, _ = states[number % len(states)]
        shutil.rmtree(self.folder, ignore_errors=True)
        rebuild({path: data for path, data in state.items() if path.startswith("features")}, self.work)
        self.look()

    @precondition(lambda self: self.folder.exists())
    @rule(name=st.sampled_from([".meta.json.7.tmp", ".shard-000-00000.json.7.tmp", ".lock-000"]))
    def leave(self, name):
        """What a killed process may leave is no obstacle."""
        (self.folder / name).write_bytes(b"half")

    @precondition(lambda self: self.folder.exists())
    @rule(
        which=st.integers(0, 100),
        how=st.sampled_from(["flip", "cut", "delete", "empty"]),
        place=st.integers(0, 1 << 30),
    )
    def damage(self, which, how, place):
        """A copy is damaged: reading or resuming it gives the very same content, or a typed error."""
        copy = self.work / f"copy-{next(self.numbers)}"
        shutil.copytree(self.folder, copy)
        files = sorted(path for path in copy.iterdir() if path.is_file())
        if not files:
            return
        path = files[which % len(files)]
        data = bytearray(path.read_bytes())
        if how == "flip" and data:
            data[place % len(data)] ^= 1 << place % 8
        path.write_bytes(bytes(data if how == "flip" else data[: place % len(data)] if how == "cut" and data else b""))
        if how == "delete":
            path.unlink()
        try:
            store = FeatureStore(copy) if (copy / INDEX).exists() else capture(copy)
            assert equal(content(store), self.reference)
        except EzhoiDiffusionError:
            assert path.suffix in (".json", ".safetensors")
        shutil.rmtree(copy)

    @precondition(lambda self: self.finished)
    @rule()
    def compare(self):
        assert mean_ap(FeatureStore(self.folder)) == self.reference_ap

    def teardown(self) -> None:
        """The same command succeeds in the end, with the same content and nothing left."""
        if self.finished:
            clear_finished(self.folder)
        store = FeatureStore(self.folder) if self.finished else capture(self.folder)
        assert equal(content(store), self.reference)
        expected = {META, INDEX, EZHOI, *(shard["file"] for shard in store.index["shards"])}
        assert {path.name for path in self.folder.iterdir()} == expected
        shutil.rmtree(self.work)


@pytest.mark.slow
def test_a_capture_survives_any_history(tmp_path):
    store = capture(tmp_path / "reference")
    assert len(store.index["shards"]) >= 3
    Histories.reference, Histories.reference_ap = content(store), mean_ap(store)
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=30,
            stateful_step_count=10,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

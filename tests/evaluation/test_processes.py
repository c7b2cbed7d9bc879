"""Work in several processes: the same results, and errors that say what to do."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from ezhoi_diffusion import Artifact, Bridge, BridgePlugin, EzhoiDiffusionError, FeatureStore, hookimpl
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.evaluation.folds import Folds
from ezhoi_diffusion.evaluation.processes import check_jobs, in_processes
from ezhoi_diffusion.evaluation.replay import replay
from ezhoi_diffusion.evaluation.trials import Step, Trials
from ezhoi_diffusion.evaluation.tune import candidates_of, tune
from ezhoi_diffusion.evaluation.variants import resolve_variants
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.testing import synthetic_store

QUICK = ["--train-steps", "15", "--denoiser-options", '{"width": 16, "depth": 1}', "--val-every", "5"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Captures and a diffusion bridge."""
    folder = tmp_path_factory.mktemp("features")
    for split in ("train", "test"):
        synthetic_store(folder / split, split=split, images=90)
    assert main(["train", str(folder / "train"), "--out", str(folder / "bridge"), *QUICK]) == 0
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks although there are few images."""
    for module in ("replay", "held_out"):
        monkeypatch.setattr(f"ezhoi_diffusion.evaluation.{module}.MAX_PAIRS", 64)


def compared(store, spec, plugins, jobs, **options):
    variants = resolve_variants(spec, plugins, check=lambda *_: None, device="cpu", **options)
    return replay(store, variants, replicates=100, jobs=jobs)


@pytest.mark.slow
def test_a_comparison_is_the_same_in_several_processes(stores):
    store, plugins = FeatureStore(stores / "test"), PluginManager()
    spec = f"none,identity,prior_only,random_move,diffusion={stores / 'bridge'}"
    sweep = {"blend": [0.1, 1.0], "start_timestep": [50, 100]}
    one, two = (compared(store, spec, plugins, jobs, sweep=sweep) for jobs in (1, 2))
    assert len(one.variants) == 1 + 3 + 5
    for name, result in one.variants.items():
        assert torch.equal(result.ap, two.variants[name].ap)
        assert result.bootstrap.to_dict() == two.variants[name].bootstrap.to_dict()


@pytest.mark.slow
def test_a_choice_is_the_same_in_several_processes(stores):
    store, plugins = FeatureStore(stores / "train"), PluginManager()
    spec = f"scale,mean_shift,residual,diffusion={stores / 'bridge'}"
    candidates = candidates_of(store, spec, plugins, check=lambda *_: None, sweep={"blend": [0.1, 1.0]})
    one, two = (tune(store, candidates, plugins, folds=3, jobs=jobs).evidence() for jobs in (1, 2))
    assert one == two


class Counting(Bridge):
    """Does nothing, and cannot be pickled."""

    row_by_row = True

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, adapter_feat, pairs=None):
        return adapter_feat


class Collecting:
    """A plugin without a bridge that counts what it sees."""

    def __init__(self):
        self.seen = 0

    @hookimpl
    def post_adapter_feat(self, adapter_feat, pairs):
        self.seen += len(adapter_feat)
        return adapter_feat


def test_what_cannot_be_sent_to_a_process_is_one_error(stores):
    store, plugins = FeatureStore(stores / "test"), PluginManager()
    plugins.register(BridgePlugin("counting", lambda folder: Counting()), "counting")
    with pytest.raises(
        EzhoiDiffusionError, match=r"cannot be sent to another process, or back \(.*lock.*\): give --jobs 1"
    ):
        compared(store, "none,counting", plugins, 2)
    collecting = Collecting()
    plugins.register(collecting, "collecting")
    plugins.enable(["collecting"])
    with pytest.raises(EzhoiDiffusionError, match="plugin 'collecting' registers no bridge, and may keep what it sees"):
        compared(store, "none,collecting", plugins, 2)


def test_a_plugin_that_keeps_what_it_sees_can_be_part_of_a_chain_with_settings(stores):
    store, plugins = FeatureStore(stores / "test"), PluginManager()
    collecting = Collecting()
    plugins.register(collecting, "collecting")
    plugins.enable(["collecting"])
    compared(store, "none,collecting+scale", plugins, 1, sweep={"factor": [2.0, 3.0]})
    assert collecting.seen >= 3 * len(store)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def locked(number):
    return threading.Lock()


def fitted(features):
    """Labels make no difference. The number of threads does, as it does to the rounding of a matrix product."""
    return Artifact("idle", {}, {"threads.safetensors": {"threads": torch.tensor(torch.get_num_threads())}})


class Idle(Bridge):
    """Does nothing."""

    row_by_row = True

    def forward(self, adapter_feat, pairs=None):
        return adapter_feat


@pytest.mark.slow
def test_what_learns_from_features_alone_is_one_bridge_with_and_without_labels(stores, two_threads):
    store, plugins = FeatureStore(stores / "train"), PluginManager()
    plugins.register(BridgePlugin("idle", lambda folder: Idle(), fitted), "idle")
    candidates = candidates_of(store, "idle", plugins, check=lambda *_: None)
    folds = Folds.of_store(store, 3)
    trials = Trials(store, candidates.recipes, candidates.bridges, folds, replicates=20, plugins=plugins, jobs=2)
    assert trials.problems([(Step(0),)], None) == [None]
    for fold in range(3):
        bridges = {trials.made[0, 0, frozenset({fold}), hidden] for hidden in (None, 0, 1, 2)}
        assert len(bridges) == 1


def killed(number):
    if number:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def failing(number):
    if number == 2:
        raise EzhoiDiffusionError("the third fails")
    return os.getpid()


def test_a_killed_process_is_one_error_and_the_next_call_works():
    with pytest.raises(EzhoiDiffusionError, match="one of 2 processes was killed"):
        list(in_processes(killed, [(number,) for number in range(4)], 2))
    found = list(in_processes(pow, [(number, 2) for number in range(20)], 2))
    assert found == [number**2 for number in range(20)]


def test_a_result_that_cannot_be_sent_back_is_one_error():
    with pytest.raises(EzhoiDiffusionError, match=r"or back \(.*lock.*\): give --jobs 1"):
        list(in_processes(locked, [(0,), (1,)], 2))


def test_what_the_work_raises_passes_as_it_is_and_the_first_is_done_here():
    results = in_processes(failing, [(number,) for number in range(9)], 2)
    assert next(results) == os.getpid()
    assert next(results) != os.getpid()
    with pytest.raises(EzhoiDiffusionError, match=r"^the third fails$"):
        list(results)


def test_a_number_of_processes_that_makes_no_sense_is_refused(stores, capsys):
    assert main(["compare", str(stores / "test"), "--bridges", "none,identity", "--jobs", "0"]) == 2
    assert "--jobs must be at least 1" in capsys.readouterr().err
    with pytest.raises(EzhoiDiffusionError, match="is for the CPU"):
        check_jobs(2, torch.device("cuda"))

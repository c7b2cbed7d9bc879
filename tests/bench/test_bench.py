"""The benchmark: its ratios and tables follow from the samples, and nothing is left out."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from ezhoi_diffusion.bench import measure, sampling, suite, training
from ezhoi_diffusion.bench.data import captured, synthetic, trained
from ezhoi_diffusion.bench.measure import BenchError, busy
from ezhoi_diffusion.bench.table import summary
from ezhoi_diffusion.cli import main
from ezhoi_diffusion.diffusion.bridge import BridgeConfig, DiffusionBridge, build_denoiser
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.diffusion.normalization import rescale
from ezhoi_diffusion.diffusion.recipes import DEFAULT_RECIPE
from ezhoi_diffusion.features.split import validation_mask
from ezhoi_diffusion.files import read_json
from ezhoi_diffusion.testing import synthetic_store

D = 32
CPU = torch.device("cpu")
TINY = suite.BenchConfig(
    sizes=(3, 5),
    evaluations=(1, 5),
    rounds=1,
    seconds=0.01,
    features=4,
    train_steps=10,
    batch=4,
    training_seconds=0.01,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("features") / "train", images=40, dim=D)


def bridge(dim=D, **changes):
    """With a network that has learned something: a fresh one gives its isotropic estimate, whatever the steps."""
    config = replace(BridgeConfig(dim, DEFAULT_RECIPE, "mlp", {"width": 16, "depth": 1}), **changes)
    torch.manual_seed(0)
    network = build_denoiser(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return DiffusionBridge(config, network, synthetic(dim=dim, texts=20, features=8).statistics)


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """What the command printed and wrote."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "QUICK", TINY)
        patch.setattr(training, "MIN_TURN", 0.01)
        patch.setattr(measure, "MIN_TURN", 0.0)
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert main(["bench", str(store.folder), "--quick", "--out", str(folder)]) == 0
    return "\n".join(printed), read_json(folder / "bench.json", dict, BenchError, ""), folder


def numbers(value, name=""):
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from numbers(entry, f"{name}.{key}")
    elif isinstance(value, list):
        for entry in value:
            yield from numbers(entry, name)
    elif isinstance(value, (int, float)):
        yield name, value


def test_the_command_writes_every_figure_and_all_are_finite_and_positive(run):
    _, result, folder = run
    assert {
        "machine", "warnings", "data", "config", "sampler", "training", "closed_form", "memory", "seconds",
    } == set(result)  # fmt: skip
    assert {"cpu", "cores", "threads", "torch", "load", "device"} <= set(result["machine"])
    for name, value in numbers(result):
        assert math.isfinite(value), name
        if "fidelity" not in name and name != ".machine.load":
            assert value > 0, name
    for entry in result["sampler"]:
        assert set(entry["ms"]) == set(entry["ratio"]) == {"3", "5"}
        assert set(entry["ms"]["3"]) == {"median", "low", "high", "samples"}
    guide, *others = result["sampler"]
    assert guide["ratio"] == {"3": 1, "5": 1}
    assert guide["fidelity"] is None
    assert all(set(entry["fidelity"]) == {"cosine", "cosine_min", "top1", "rows"} for entry in others)
    assert [entry["name"] for entry in result["training"]] == list(training.TRAINERS)
    assert [entry["name"] for entry in result["memory"]] == [guide["name"], others[0]["name"], *training.TRAINERS]
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_are_those_of_the_medians(run):
    _, result, _ = run
    guide = result["sampler"][0]["ms"]["5"]["median"]
    for entry in result["sampler"]:
        assert entry["ratio"]["5"] == pytest.approx(guide / entry["ms"]["5"]["median"])
    published = next(e["steps_per_second"]["median"] for e in result["training"] if e["name"] == "Trainer1D, unet1d")
    for entry in result["training"]:
        assert entry["ratio"] == pytest.approx(entry["steps_per_second"]["median"] / published)


def test_the_table_names_all_cases_and_what_was_not_timed(run):
    printed, result, _ = run
    for entry in (*result["sampler"], *result["training"], *result["memory"]):
        assert f"\n{entry['name']}" in printed
    names = [entry["name"] for entry in result["sampler"]]
    assert names == [
        "the guide's unet1d", "mlp, recipe gentle", "mlp, S = 1", "mlp, S = 5", "gaussian, S = 5, cubic",
    ]  # fmt: skip
    assert "the guide's unet1d*" in printed
    assert "timed on 2 of its 600 evaluations, times 300" in printed
    assert f"trained on the texts for {TINY.train_steps} steps" in printed


def test_the_summary_of_a_busy_machine_and_of_a_bridge_as_given(run):
    _, result, _ = run
    warned = summary({**result, "warnings": ["the machine is busy"], "closed_form": None})
    assert "warning: the machine is busy" in warned
    assert "closed-form" not in warned
    reached = {**result["closed_form"], "reached_at_step": 300, "reached_after_seconds": 7.0}
    assert "below it after 300 steps, 7 s" in summary({**result, "closed_form": reached})
    assert "not reached in 10 steps" in summary({**result, "closed_form": {**reached, "reached_at_step": None}})


def test_all_evaluations_against_themselves_are_the_same_result_and_fewer_are_not():
    data = synthetic(dim=D, texts=20, features=8)
    entries = sampling.bridge_cases(bridge(), (1, 600), Components())
    found = dict(zip([e.name for e in entries], sampling.nearness(entries, data.visual, data.text), strict=True))
    whole = found["mlp, S = 600"]
    assert (whole["cosine"], whole["cosine_min"]) == pytest.approx((1, 1), abs=1e-6)
    assert whole["top1"] == 1
    assert found["mlp, S = 1"]["cosine"] < 0.999
    assert found["the guide's unet1d"] is None


def test_the_reference_has_every_timestep_and_the_start_of_its_case():
    entries = sampling.bridge_cases(bridge(), (1, 5, 20), Components())
    recipes = [(e.bridge.config.recipe, e.reference.config.recipe) for e in entries if e.reference]
    assert all(own.start_timestep == other.start_timestep == other.num_steps for own, other in recipes)
    assert {own.start_timestep for own, _ in recipes} == {100, 600}


def test_untimed_evaluations_count_like_timed_ones(monkeypatch):
    entries = sampling.bridge_cases(bridge(), (5,), Components())
    monkeypatch.setattr(sampling, "take_turns", lambda turns, **_: {name: [0.002, 0.004, 0.003] for name in turns})
    guide, other, *_ = sampling.cost(entries, torch.randn(4, D), 16, seconds=0, rounds=1)
    assert other == {"median": pytest.approx(3), "low": pytest.approx(2.5), "high": pytest.approx(3.5), "samples": 3}
    assert guide["median"] == pytest.approx(300 * 3)


def test_cases_take_turns(monkeypatch):
    monkeypatch.setattr(measure, "MIN_TURN", 0.0)
    order = []
    turns = {name: partial(measure.repeated, partial(order.append, name), CPU) for name in "abc"}
    samples = measure.take_turns(turns, seconds=0, rounds=3)
    assert "".join(order) == 3 * "abc"
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_every_bridge_is_called_once_before_it_is_timed(monkeypatch):
    cases, called = sampling.bridge_cases(bridge(), (5,), Components()), []
    monkeypatch.setattr(DiffusionBridge, "forward", lambda self, x: called.append(self.config))
    monkeypatch.setattr(sampling, "take_turns", lambda turns, **_: {name: [len(called)] for name in turns})
    sampling.cost(cases, torch.randn(4, D), 16, seconds=0, rounds=1)
    assert called == [case.timed.config for case in cases]


def test_one_sample_has_no_spread():
    assert measure.spread([2.0]) == {"median": 2, "low": 2, "high": 2, "samples": 1}


def test_the_first_steps_of_a_turn_are_not_timed_and_the_clock_is_not_asked_after_each(monkeypatch):
    monkeypatch.setattr(training, "WARM_UP", {"cpu": 3})
    monkeypatch.setattr(training, "TOGETHER", {"cpu": 2})
    asked, steps = [], []
    monkeypatch.setattr(training, "now", lambda _: asked.append(len(steps)) or {3: 7.0, 5: 7.5, 7: 9.0}[len(steps)])

    def run(after_step):
        while True:
            steps.append(None)
            after_step()

    assert training.step_seconds(run, CPU, seconds=2) == [0.25, 0.75]
    assert asked == [3, 5, 7]


@pytest.mark.parametrize("name", ["ours, mlp", "Trainer1D, mlp"])
def test_a_training_can_be_timed_again(store, name):
    run = partial(training.run_training, name, captured(store), 4, Components())
    for _ in range(2):
        assert len(training.step_seconds(run, CPU, seconds=0)) == 1


def test_a_network_in_channels_is_the_network_at_its_norm():
    network, x = bridge().denoiser, torch.randn(4, D)
    t = torch.tensor([3, 50, 200, 700])
    given = training.OnChannels(network, 5.0)(x.unsqueeze(1), t)
    assert given.shape == (4, 1, D)
    assert torch.equal(given.squeeze(1), network(rescale(x, 5.0), t))


def test_captured_features_are_of_images_that_nothing_learns_from(store, tmp_path):
    data = captured(store)
    apart = validation_mask(len(store.images))[store.image_index()]
    assert sorted(data.visual.tolist()) == sorted(store.adapter_feat()[apart].tolist())
    test = synthetic_store(tmp_path / "test", split="test", dim=D)
    assert sorted(captured(test).visual.tolist()) == sorted(test.adapter_feat().tolist())


def test_synthetic_features_have_two_cones():
    statistics = synthetic().statistics
    assert 0.6 < float(statistics.text_mean.norm()) < 0.9
    assert 0.4 < float(statistics.visual_mean.norm()) < 0.9
    assert statistics.gap > 0.5


def test_a_training_says_when_it_was_below_the_closed_form(monkeypatch):
    from ezhoi_diffusion.bench import data as bench_data

    monkeypatch.setattr(bench_data, "VALIDATE_EVERY", 2)
    *_, found = trained(synthetic(dim=D, texts=20, features=8), 4, Components(), CPU)
    assert found["val_loss"] < found["baseline_loss"]  # eighteen texts say little of a covariance
    assert found["reached_at_step"] == 2
    assert found["reached_after_seconds"] == pytest.approx(found["seconds"] / 2)
    *_, found = trained(synthetic(dim=D, texts=400, features=8), 2, Components(), CPU)
    assert found["val_loss"] > found["baseline_loss"] > 0
    assert found["reached_at_step"] is found["reached_after_seconds"] is None


def test_a_student_is_measured_as_it_is():
    student = bridge(student_of={"num_steps": 5}, recipe=replace(DEFAULT_RECIPE, num_steps=1))
    entries = sampling.bridge_cases(student, (1, 5), Components())
    assert [e.name for e in entries] == ["the guide's unet1d", "mlp, a student"]
    assert sampling.nearness(entries, torch.randn(4, D), torch.randn(4, D)) == [None] * 2


MIB = 1 << 20


def hog(floats):
    return measure.peak_growth(lambda: torch.ones(floats).sum(), CPU)


def test_memory_is_that_of_the_work_whatever_was_used_before():
    _ = torch.ones(128 * MIB).sum()  # 512 MiB, in the process that starts the other
    assert 60 * MIB < measure.in_new_process(hog, 16 * MIB) < 90 * MIB


def test_a_busy_machine_is_reported():
    assert busy({"load": 0.4, "cores": 2}) is None
    assert "load average 3.00 on 2 cores" in busy({"load": 3.0, "cores": 2})


@pytest.fixture
def fails(capsys):
    def check(line, *said):
        assert main(["bench", *map(str, line)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert all(words in error for words in said)

    return check


def test_a_bridge_of_another_width_is_refused(store, tmp_path, fails):
    bridge(dim=16).save_pretrained(tmp_path / "bridge")
    fails([store.folder, "--bridge", tmp_path / "bridge"], "width 16", f"have {D}", str(tmp_path / "bridge"))


def test_a_bridge_of_another_run_is_refused(store, tmp_path, fails):
    bridge().save_pretrained(tmp_path / "bridge")
    fails([store.folder, "--bridge", tmp_path / "bridge"], "made for another EZ-HOI run", "--force")


def test_a_bridge_needs_features(tmp_path, fails):
    fails(["--bridge", tmp_path], "--bridge needs FEATURES")


def test_folders_without_features_or_bridge(store, tmp_path, fails):
    fails([tmp_path / "none"], str(tmp_path / "none"))
    fails([store.folder, "--bridge", tmp_path], str(tmp_path))


def test_too_few_images(tmp_path, fails):
    synthetic_store(tmp_path / "one", images=1, dim=D)
    fails([tmp_path / "one"], "too few images")


def test_a_width_that_the_guides_network_does_not_take(tmp_path, fails):
    synthetic_store(tmp_path / "odd", dim=20)
    fails([tmp_path / "odd"], "width 20", "multiples of 8")

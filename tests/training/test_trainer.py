"""Training learns, splits by image, resumes bit-equally, and gives the same on two processes."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.diffusion.normalization import normalize
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.diffusion.schedule import Schedule
from ezhoi_diffusion.diffusion.timesteps import make_timesteps
from ezhoi_diffusion.errors import EzhoiDiffusionError, Interrupted
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.training.data import TrainingSet
from ezhoi_diffusion.training.loss import denoising_loss
from ezhoi_diffusion.training.processes import exit_distributed
from ezhoi_diffusion.training.trainer import TrainingData, TrainingError, train
from helpers import TESTS
from helpers.trainings import DIM, QUICK, Stop, asked_to_end_at, equal, low_rank, stop_at, weights


def test_learns_more_than_the_isotropic_estimate(tmp_path):
    config = replace(
        QUICK,
        train_steps=400,
        val_every=100,
        checkpoint_every=400,
        learning_rate=2e-3,
        denoiser_options={"width": 64, "depth": 2},
    )
    data = low_rank()
    out = train(data, config, tmp_path / "out")
    facts = json.loads((out / "training.json").read_text())
    assert facts["best_val_loss"] < 0.7 * facts["isotropic_val_loss"]
    assert [r["step"] for r in facts["history"] if "val_loss" in r] == [100, 200, 300, 400]
    assert facts["seconds"] > 0

    bridge = DiffusionBridge.from_pretrained(out)
    assert bridge.provenance["run"] == "test"
    best = min((r for r in facts["history"] if "val_loss" in r), key=lambda r: r["val_loss"])
    training = bridge.provenance["training"]
    assert (training["step"], training["val_loss"]) == (best["step"], best["val_loss"])
    assert (facts["best_step"], facts["best_val_loss"]) == (best["step"], best["val_loss"])
    assert training["val_loss_by_range"] == facts["val_loss_by_range"] == best["val_loss_by_range"]
    assert torch.equal(bridge.context["ctx"], torch.ones(2))
    assert torch.isfinite(bridge(data.visual)).all()


@pytest.mark.parametrize("objective", ["pred_noise", "pred_v"])
def test_other_objectives_give_a_good_x0(tmp_path, objective):
    config = replace(QUICK, train_steps=150, objective=objective, learning_rate=2e-3, val_every=150)
    data = low_rank()
    bridge = DiffusionBridge.from_pretrained(train(data, config, tmp_path / "out"))
    z = TrainingSet.from_data(data, config)[torch.arange(60)]
    for t in (20, 99):
        x0 = bridge.predict_x0(z, t)
        assert nn.functional.cosine_similarity(x0, z).mean() > 0.9


@pytest.mark.parametrize("recipe", ["guide", "paper"])
def test_features_lose_the_mean_of_their_recipe_and_are_split_by_image(recipe):
    data = low_rank()
    config = replace(QUICK, recipe=RECIPES[recipe])
    chosen = TrainingSet.from_data(data, config)
    if recipe == "guide":
        assert chosen.source is data.visual
        assert not set(data.image[chosen.training].tolist()) & set(data.image[chosen.validation].tolist())
    else:
        assert chosen.source is data.text
        assert len(chosen.validation) == 6
    assert torch.equal(chosen.mean, data.statistics.text_mean)


def test_held_out_images_do_not_depend_on_the_seed():
    data, config = low_rank(), replace(QUICK, recipe=RECIPES["guide"])
    first, other = (TrainingSet.from_data(data, replace(config, seed=seed)) for seed in (0, 1))
    assert torch.equal(first.validation, other.validation)
    text = [TrainingSet.from_data(data, replace(QUICK, seed=seed)).validation for seed in (0, 1)]
    assert not torch.equal(*text), "text features have no image: the seed decides"
    more = replace(data, images=200)
    assert set(TrainingSet.from_data(more, config).validation.tolist()) != set(first.validation.tolist())
    with pytest.raises(TrainingError, match="are left to train on"):
        TrainingSet.from_data(replace(data, image=torch.full_like(data.image, 3), images=90), config)


# Pairs


def rotated(classes: int = 12, each: int = 40, dim: int = DIM, noise: int = 1) -> TrainingData:
    """Visual features: the text of their class, rotated, shifted, scaled and with noise of that seed."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(classes, dim, generator=generator) + 2
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    own = text.repeat_interleave(each, 0)
    visual = 3 * (own @ turn + 4) + 0.5 * torch.randn(own.shape, generator=torch.Generator().manual_seed(noise))
    image = torch.arange(len(own)) % 60
    return TrainingData(visual, image, text, ModalityStatistics.compute([visual], text), own_text=own, images=60)


def test_pairs_are_mixed_from_text_to_the_visual_feature_with_noise():
    data, recipe = rotated(), replace(RECIPES["paired"], noise_augmentation=0.5)
    chosen = TrainingSet.from_data(data, replace(QUICK, recipe=recipe))
    some = torch.arange(7)
    z_text, _ = normalize(data.own_text[some], data.statistics.text_mean, 5.0)
    z_visual, _ = normalize(data.visual[some], data.statistics.visual_mean, 5.0)
    assert torch.equal(chosen[some], z_text)
    torch.testing.assert_close(chosen.noise(some, torch.zeros(7, DIM)), z_visual)
    gaussian = torch.randn(7, DIM, generator=torch.Generator().manual_seed(0))
    blurred = chosen.noise(some, gaussian)
    torch.testing.assert_close(blurred.norm(dim=1), torch.full((7,), 5.0))
    expected = z_visual + 0.5 * 5 / DIM**0.5 * gaussian
    torch.testing.assert_close(blurred, 5 * expected / expected.norm(dim=1, keepdim=True))
    assert not set(data.image[chosen.training].tolist()) & set(data.image[chosen.validation].tolist())


def test_with_a_right_estimate_sampling_on_pairs_sees_what_training_saw():
    """Both sides lie at an angle, so that their mixtures are not of the norm of either."""
    data, recipe = rotated(), replace(RECIPES["paired"], noise_augmentation=0.0, num_steps=10)
    config = replace(QUICK, recipe=recipe)
    features, schedule, some = TrainingSet.from_data(data, config), Schedule.cosine(), torch.arange(0, 480, 9)
    text, visual = features[some], features.noise(some, torch.zeros(len(some), DIM))
    assert (text * visual).sum(1).abs().max() > 0.3 * 25
    trained, sampled = {}, {}

    def estimate(x, t):
        sampled[t] = x
        return text

    def network(x, t):
        trained[int(t[0])] = x
        return text

    end = Components().samplers[recipe.sampler](
        estimate, visual, schedule=schedule, timesteps=make_timesteps(recipe.spacing, 10, 1000), scale_factor=5.0
    )
    assert torch.equal(end, text)
    for t in sampled:
        denoising_loss(network, text, torch.full((len(some),), t), visual, schedule, "pred_x0", 5.0, paired=True)
    assert len(trained) == 10
    for t, x in trained.items():
        torch.testing.assert_close(sampled[t], x, atol=1e-3, rtol=0)


def test_a_bridge_trained_on_pairs_leads_other_features_to_their_own_text(tmp_path):
    data, other = rotated(), rotated(noise=2)
    recipe = replace(RECIPES["paired"], blend=1.0)
    config = replace(
        QUICK, recipe=recipe, train_steps=600, learning_rate=2e-3, val_every=50, checkpoint_every=600, patience=3,
        denoiser_options={"width": 64, "depth": 2},
    )  # fmt: skip
    out = train(data, config, tmp_path / "out")
    bridge = DiffusionBridge.from_pretrained(out)
    statistics = data.statistics
    z_text = normalize(data.own_text, statistics.text_mean, 1.0)[0]
    before = normalize(other.visual, statistics.visual_mean, 1.0)[0]
    after = normalize(bridge(other.visual), statistics.visual_mean, 1.0)[0]
    cosine = [float((z * z_text).sum(1).mean()) for z in (before, after)]
    assert cosine[0] < 0.3
    assert cosine[1] > 0.8
    facts = json.loads((out / "training.json").read_text())
    assert bridge.provenance["training"]["val_loss"] == facts["best_val_loss"], "the best, not the last"
    assert bridge.provenance["training"]["stopped"] == facts["stopped"]


def test_pairs_need_texts_and_objective_pred_x0():
    with pytest.raises(TrainingError, match="no text of a feature's own class"):
        TrainingSet.from_data(low_rank(), replace(QUICK, recipe=RECIPES["paired"]))
    with pytest.raises(TrainingError, match="pred_x0 for a recipe"):
        replace(QUICK, recipe=RECIPES["paired"], objective="pred_v")


def test_a_recipe_that_learns_from_visual_features_runs(tmp_path):
    recipe = replace(RECIPES["guide"], num_steps=5)
    out = train(low_rank(), replace(QUICK, recipe=recipe), tmp_path / "out")
    assert DiffusionBridge.from_pretrained(out).config.recipe == recipe


def test_resident_features_equal_those_taken_batch_by_batch(tmp_path, monkeypatch):
    kept = train(low_rank(), QUICK, tmp_path / "kept")
    monkeypatch.setattr("ezhoi_diffusion.training.data.BLOCK", 16)  # 60 features are then too many to keep
    assert TrainingSet.from_data(low_rank(), QUICK).resident(torch.device("cpu")) is None
    taken = train(low_rank(), QUICK, tmp_path / "taken")
    assert all(torch.allclose(x, weights(taken)[name], atol=1e-7) for name, x in weights(kept).items())


def test_training_draws_no_global_random_number(tmp_path):
    state = torch.get_rng_state()
    train(low_rank(), QUICK, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("step", [3, 6])
def test_an_interrupted_run_may_end_where_it_stopped(tmp_path, capsys, step):
    """Without a record in the history, and with one of an earlier step, the end is that of a run this long."""
    whole = train(low_rank(), replace(QUICK, train_steps=step), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(low_rank(), QUICK, tmp_path / "out", on_step=asked_to_end_at(step))
    capsys.readouterr()
    out = train(low_rank(), replace(QUICK, train_steps=step), tmp_path / "out", resume=True)
    assert f"train_steps was 12, is now {step}\n" in capsys.readouterr().err
    assert equal(weights(out), weights(whole))
    histories = [json.loads((folder / "training.json").read_text())["history"] for folder in (out, whole)]
    assert histories[0] == histories[1]
    assert [record["step"] for record in histories[0] if "val_loss" in record] == [*range(4, step, 4), step]


def test_an_existing_checkpoint_is_not_written_again(tmp_path):
    manifest = tmp_path / "out" / "checkpoints" / "step-000000004" / "manifest.json"
    inodes = []

    def on_step(done):
        if done == 4:
            inodes.append(manifest.stat().st_ino)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(low_rank(), QUICK, tmp_path / "out", on_step=on_step)
    assert manifest.stat().st_ino == inodes[0]


@pytest.mark.parametrize("step", [2, 6, 11])
def test_an_interrupted_run_ends_bit_equal(tmp_path, step):
    """Stopped before the first checkpoint and between two, with accumulation, across epochs."""
    config = replace(QUICK, gradient_accumulate=2)
    whole = train(low_rank(), config, tmp_path / "whole")
    with pytest.raises(Stop):
        train(low_rank(), config, tmp_path / "broken", on_step=stop_at(step))
    torch.rand(3)
    resumed = train(low_rank(), config, tmp_path / "broken", resume=True)
    assert equal(weights(resumed), weights(whole))
    histories = [json.loads((f / "training.json").read_text())["history"] for f in (whole, resumed)]
    assert histories[0] == histories[1]


def test_a_finished_run_may_be_extended(tmp_path):
    longer = replace(QUICK, train_steps=20)
    whole = train(low_rank(), longer, tmp_path / "whole")
    train(low_rank(), QUICK, tmp_path / "out")
    grown = train(low_rank(), longer, tmp_path / "out", resume=True)
    assert equal(weights(grown), weights(whole))


def test_resuming_refuses_another_run(tmp_path):
    out = train(low_rank(), QUICK, tmp_path / "out")
    before = weights(out)
    for config, says in (
        (replace(QUICK, learning_rate=1e-3, seed=1), r"learning_rate \(was 0.0003, is 0.001\), seed"),
        (replace(QUICK, recipe=replace(QUICK.recipe, blend=0.5)), "recipe"),
        (replace(QUICK, train_steps=4), "beyond train_steps 4"),
    ):
        with pytest.raises(TrainingError, match=says):
            train(low_rank(), config, out, resume=True)
    with pytest.raises(TrainingError, match="other features"):
        train(low_rank(texts=61), QUICK, out, resume=True)
    assert equal(weights(out), before)


def test_training_leaves_an_occupied_folder_alone(tmp_path):
    out = train(low_rank(), QUICK, tmp_path / "out")
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(TrainingError, match="holds a trained bridge: resume"):
        train(low_rank(), QUICK, out)
    for checkpoint in (out / "checkpoints").glob("step-*"):
        (checkpoint / "manifest.json").unlink()
    with (
        pytest.warns(UserWarning, match="skipping checkpoint"),
        pytest.raises(TrainingError, match="no complete checkpoint"),
    ):
        train(low_rank(), QUICK, out, resume=True)
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(Stop):
        train(low_rank(), QUICK, tmp_path / "broken", on_step=stop_at(5))
    with pytest.raises(TrainingError, match="an unfinished training"):
        train(low_rank(), QUICK, tmp_path / "broken")


def test_a_nan_loss_ends_the_run_and_keeps_the_last_checkpoint(tmp_path):
    network = nn.Linear(DIM, DIM)

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x, t):
            return self.network(x)

    def put_in_nan(done):
        if done == 5:
            nn.init.constant_(network.weight, torch.nan)

    registry = Components()
    registry.denoisers.register("fragile", lambda dim, schedule, objective, scale_factor: Denoiser())
    config = replace(QUICK, denoiser="fragile", denoiser_options={})
    with pytest.raises(TrainingError, match=r"nan at step 6: lower the learning rate"):
        train(low_rank(), config, tmp_path / "out", registry=registry, on_step=put_in_nan)
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-000000004"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works with a GPU")
def test_fp16_needs_a_gpu(tmp_path):
    with pytest.raises(TrainingError, match="fp16 needs a GPU"):
        train(low_rank(), replace(QUICK, mixed_precision="fp16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bf16_runs_and_stays_near_float32(tmp_path):
    exact = train(low_rank(), QUICK, tmp_path / "no")
    rough = train(low_rank(), replace(QUICK, mixed_precision="bf16"), tmp_path / "bf16")
    exact, rough = (load_file(out / "model.safetensors") for out in (exact, rough))
    for name, value in rough.items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, exact[name], atol=5e-3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text": torch.randn(1, DIM)}, "too few text features"),
        ({"text": torch.full((9, DIM), torch.nan)}, "NaN"),
        ({"text": torch.randn(9, DIM + 1)}, "must be"),
        ({"text": torch.randn(9)}, "must be"),
    ],
)
def test_refuses_data(tmp_path, change, says):
    with pytest.raises(TrainingError, match=says):
        train(replace(low_rank(), **change), QUICK, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_bridge_refuses_is_refused_before_the_first_step(tmp_path):
    visual = low_rank().visual
    one_text = replace(low_rank(), statistics=ModalityStatistics.compute([visual], torch.eye(DIM)[:1]))
    for broken, config, says in (
        (one_text, QUICK, "text mean"),
        (low_rank(), replace(QUICK, recipe=replace(QUICK.recipe, sampler="nobody")), "nobody"),
        (low_rank(), replace(QUICK, denoiser_options={"wdth": 1}), "wdth"),
    ):
        with pytest.raises(EzhoiDiffusionError, match=says):
            train(broken, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_image_cannot_be_split(tmp_path):
    data = replace(low_rank(), image=torch.zeros(90, dtype=torch.int64))
    with pytest.raises(TrainingError, match="too few images"):
        train(data, replace(QUICK, recipe=RECIPES["guide"]), tmp_path / "out")


def main(out: str) -> None:
    """Train in one of two processes."""
    torch.set_num_threads(1)
    train(low_rank(), replace(QUICK, gradient_accumulate=2), Path(out))
    exit_distributed()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS / "training"), *sys.path)),
    }
    code = f"import test_trainer as t; t.main({str(tmp_path / 'two')!r})"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    main(str(tmp_path / "one"))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "training.json").read_text())["processes"] == 2
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5)


def test_an_out_that_is_a_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TrainingError, match="cannot be written"):
        train(low_rank(), QUICK, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_resumed_with_no_step_left_is_finished(tmp_path):
    config = replace(QUICK, checkpoint_every=4, val_every=3)
    with pytest.raises(Stop):
        train(low_rank(), config, tmp_path, on_step=stop_at(5))
    train(low_rank(), replace(config, train_steps=4), tmp_path, resume=True)
    assert DiffusionBridge.from_pretrained(tmp_path).provenance["training"]["step"] == 4

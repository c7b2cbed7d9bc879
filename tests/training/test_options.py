"""Options of a training: each has its effect, and survives an interruption."""

import math
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ezhoi_diffusion.cli import build_parser
from ezhoi_diffusion.cli.train import train_config
from ezhoi_diffusion.diffusion.bridge import BridgeConfig, DiffusionBridge, build_denoiser
from ezhoi_diffusion.errors import Interrupted
from ezhoi_diffusion.training.data import TrainingSet
from ezhoi_diffusion.training.trainer import train
from ezhoi_diffusion.training.validation import Validation
from helpers.trainings import OVERFIT, QUICK, Stop, asked_to_end_at, equal, facts, few, low_rank, stop_at, weights

# The bridge of a training


def test_the_search_ends_with_the_weights_of_the_lowest_validation_loss(tmp_path):
    """The network memorises its texts, and the validation loss of the best weights is the lowest in the history."""
    data = low_rank(texts=12, rank=32)  # texts in all directions: nothing to generalise
    config = replace(OVERFIT, patience=0, lr_schedule="constant", train_steps=100, val_every=10)
    with pytest.raises(Stop):
        train(data, config, tmp_path / "searched", on_step=stop_at(config.train_steps + 1))
    out = train(data, config, tmp_path / "out")
    found = facts(out)
    assert found["best_step"] < found["step"] == config.train_steps
    assert found["best_val_loss"] < 0.98 * found["history"][-1]["val_loss"]
    bridge = DiffusionBridge.from_pretrained(tmp_path / "searched" / "best")
    validation = Validation.from_features(TrainingSet.from_data(data, config), config)
    losses = validation.losses(bridge.denoiser, torch.device("cpu"))
    assert fmean(losses) == pytest.approx(found["best_val_loss"], rel=1e-6)
    assert losses == pytest.approx(found["val_loss_by_range"], rel=1e-6)


def result(out):
    """Step, loss and weights of the bridge, after a check that training.json agrees."""
    training, found = DiffusionBridge.from_pretrained(out).provenance["training"], facts(out)
    assert (training["step"], training["val_loss"]) == (found["best_step"], found["best_val_loss"])
    assert training["config"] == found["config"]
    assert training["stopped"] == found["stopped"]
    return training["step"], training["val_loss"], load_file(out / "model.safetensors")


def test_best_exists_while_training_and_nothing_depends_on_it(tmp_path):
    whole = train(few(), OVERFIT, tmp_path / "whole")
    assert not (whole / "best").exists()
    with pytest.raises(Stop):
        train(few(), OVERFIT, tmp_path / "cut", on_step=stop_at(9))
    assert DiffusionBridge.from_pretrained(tmp_path / "cut" / "best").provenance["training"]["step"] <= 8
    (tmp_path / "cut" / "best" / "model.safetensors").write_bytes(b"damaged")
    cut = train(few(), OVERFIT, tmp_path / "cut", resume=True)
    assert equal(weights(cut), weights(whole))
    assert result(cut)[:2] == result(whole)[:2]


def test_a_validation_at_an_early_end_counts_for_that_end_only(tmp_path):
    """Step 12 is no multiple of 10 and has the lowest loss. The extended run ends as one that never stopped."""
    config = replace(QUICK, train_steps=20, val_every=10, learning_rate=1e-2, ema_decay=0.5, checkpoint_every=50)
    whole = train(low_rank(), config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(low_rank(), config, tmp_path / "out", on_step=asked_to_end_at(12))
    out = train(low_rank(), replace(config, train_steps=12), tmp_path / "out", resume=True)
    early = result(out)
    assert early[0] == 12, "later is better here"
    again = train(low_rank(), replace(config, train_steps=12), tmp_path / "out", resume=True)
    assert equal(result(again)[2], early[2])
    train(low_rank(), config, out, resume=True)
    assert result(out)[:2] == result(whole)[:2]
    assert equal(result(out)[2], result(whole)[2])


# Learning rate and weight decay


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_optimizer_gets_the_learning_rate_of_the_formula(tmp_path, schedule):
    config = replace(QUICK, lr_schedule=schedule, warmup_steps=4, learning_rate=0.5, val_every=1)
    used = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    try:
        out = train(low_rank(), config, tmp_path / "out")
    finally:
        hook.remove()
    after = {
        "constant": lambda p: 1,
        "linear": lambda p: 1 - p,
        "cosine": lambda p: math.cos(math.pi * p / 2) ** 2,
    }[schedule]
    wanted = [0.5 * w for w in (0.25, 0.5, 0.75, 1, *(after(k / 8) for k in range(8)))]
    searched, refitted = used[:12], used[12:]
    assert searched == pytest.approx(wanted, abs=1e-12)
    assert [record["lr"] for record in facts(out)["history"]] == searched
    assert refitted == searched[: facts(out)["best_step"]]


def test_weight_decay_is_decoupled(tmp_path):
    """After one step the weights differ from those without it by −lr·λ·w0, whatever the gradient."""
    config = replace(QUICK, train_steps=1, learning_rate=1e-2)
    out = (
        train(low_rank(), config, tmp_path / "plain"),
        train(low_rank(), replace(config, weight_decay=0.3), tmp_path / "decayed"),
    )
    plain, decayed = (load_file(folder / "model.safetensors") for folder in out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        start = build_denoiser(BridgeConfig(32, config.recipe, "mlp", config.denoiser_options)).state_dict()
    for name, value in plain.items():
        assert torch.allclose(decayed[name] - value, -1e-2 * 0.3 * start[name], atol=1e-7)


def test_the_average_may_be_updated_less_often(tmp_path):
    """Every second step: the average is that of the even steps, beginning with the first of them."""
    states = []
    config = replace(QUICK, train_steps=6, checkpoint_every=1, ema_update_every=2, ema_decay=0.6)

    def keep(done):
        if done > 6:
            states.append(weights(tmp_path / "out" / "checkpoints" / "refit" / f"step-{done - 6:09d}"))

    out = train(low_rank(), config, tmp_path / "out", on_step=keep)
    for name, average in load_file(out / "model.safetensors").items():
        wanted = 0.6 * (0.6 * states[1][name] + 0.4 * states[3][name]) + 0.4 * states[5][name]
        assert torch.allclose(average, wanted, atol=1e-6)


# Early stopping


def test_patience_stops_and_records_the_reason(tmp_path):
    """The steps are too small to change a float32. The third validation after the first ends the run."""
    config = replace(QUICK, train_steps=40, learning_rate=1e-30, patience=3)
    out = train(low_rank(), config, tmp_path / "out")
    found = facts(out)
    assert found["step"] == 16
    assert found["stopped"].startswith("patience 3: no validation after step 4 went below")
    training = DiffusionBridge.from_pretrained(out).provenance["training"]
    assert (training["step"], training["stopped"]) == (found["best_step"], found["stopped"]) == (4, found["stopped"])
    assert facts(train(low_rank(), replace(config, patience=0), tmp_path / "off"))["stopped"] == "all 40 steps are done"


def test_an_extended_run_stops_where_an_uninterrupted_one_does(tmp_path):
    """The extra validation at the first end, step 6, does not count."""
    config = replace(QUICK, train_steps=6, learning_rate=1e-30, patience=3)
    train(low_rank(), config, tmp_path / "out")
    out = train(low_rank(), replace(config, train_steps=40), tmp_path / "out", resume=True)
    assert facts(out)["step"] == 16


def test_a_stopped_run_stays_stopped_until_patience_grows(tmp_path):
    out = train(few(), OVERFIT, tmp_path / "out")
    stopped, before = facts(out), weights(out)
    assert stopped["step"] < 60
    best = min((r for r in stopped["history"] if "val_loss" in r), key=lambda r: r["val_loss"])
    assert stopped["step"] == best["step"] + 3 * 2
    assert best["val_loss"] == stopped["best_val_loss"] < stopped["history"][-1]["val_loss"]

    train(few(), OVERFIT, out, resume=True)
    assert facts(out)["stopped"] == stopped["stopped"]
    assert equal(weights(out), before)

    patient = replace(OVERFIT, patience=6)
    whole = train(few(), patient, tmp_path / "whole")
    train(few(), patient, out, resume=True)
    assert facts(out)["step"] == facts(whole)["step"] > stopped["step"]
    assert facts(out)["history"] == facts(whole)["history"]
    assert equal(weights(out), weights(whole))


@pytest.mark.parametrize("step", [3, 8, 15])
def test_an_interrupted_run_with_every_option_ends_bit_equal(tmp_path, step):
    whole = train(few(), OVERFIT, tmp_path / "whole")
    with pytest.raises(Stop):
        train(few(), OVERFIT, tmp_path / "broken", on_step=stop_at(step))
    resumed = train(few(), OVERFIT, tmp_path / "broken", resume=True)
    assert equal(weights(resumed), weights(whole))
    for key in ("history", "stopped", "best_val_loss"):
        assert facts(resumed)[key] == facts(whole)[key]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], (2000, 100, 3e-4, 0)),
        (["--recipe", "paired"], (5000, 500, 8e-5, 5)),
        (["--recipe", "guide"], (5000, 500, 8e-5, 0)),
        (["--denoiser", "unet1d"], (2000, 100, 8e-5, 0)),
        (["--recipe", "paired", "--train-steps", "70", "--learning-rate", "0.1"], (70, 500, 0.1, 5)),
    ],
)
def test_defaults_fit_recipe_and_denoiser(flags, expected):
    config = train_config(build_parser(words := ["train", "F", "--out", "O", *flags]).parse_args(words))
    assert (config.train_steps, config.val_every, config.learning_rate, config.patience) == expected

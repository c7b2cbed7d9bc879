"""The validation loss by range of timesteps, and the notes on it."""

from dataclasses import replace
from statistics import fmean

import pytest
import torch

from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.diffusion.schedule import isotropic_estimate
from ezhoi_diffusion.report import plots
from ezhoi_diffusion.training.curve import notes
from ezhoi_diffusion.training.data import TrainingSet
from ezhoi_diffusion.training.loss import denoising_loss
from ezhoi_diffusion.training.trainer import train
from ezhoi_diffusion.training.validation import Validation
from helpers.trainings import QUICK, facts, low_rank


def validation(num_timesteps=1000):
    config = replace(QUICK, num_timesteps=num_timesteps)
    return Validation.from_features(TrainingSet.from_data(low_rank(), config), config)


def test_the_ranges_cover_all_timesteps_and_their_mean_is_the_loss():
    batch = validation()
    assert batch.ranges == [(0, 198), (200, 398), (400, 598), (600, 798), (800, 998)]
    skip, _ = isotropic_estimate(batch.schedule, batch.objective, 32, batch.scale_factor)

    def estimate(x, t):
        return skip[t].float().unsqueeze(1) * x

    at_once = denoising_loss(
        estimate, batch.z, batch.t, batch.noise, batch.schedule, batch.objective, batch.scale_factor
    )
    assert fmean(batch.baseline_losses()) == pytest.approx(at_once.item(), rel=1e-5)

    def knows_little_noise(x, t):
        return torch.where(t.unsqueeze(1) < 200, batch.z[: len(x)], estimate(x, t))

    losses = batch.losses(knows_little_noise)
    assert losses[0] == 0
    assert losses[1:] == batch.baseline_losses()[1:]


def test_few_timesteps_still_give_five_ranges():
    assert len(validation(num_timesteps=101).baseline_losses()) == 5


def test_ranges_are_in_the_files_and_in_the_plot(tmp_path, monkeypatch):
    out = train(low_rank(), replace(QUICK, lr_schedule="linear"), tmp_path / "out")
    found = facts(out)
    validated = [record for record in found["history"] if "val_loss" in record]
    assert all(record["val_loss"] == fmean(record["val_loss_by_range"]) for record in validated)
    assert found["isotropic_val_loss"] == fmean(found["isotropic_val_loss_by_range"])
    training = DiffusionBridge.from_pretrained(out).provenance["training"]
    assert training["val_loss_by_range"] == validated[-1]["val_loss_by_range"]

    drawn = []
    save = plots.save_png
    monkeypatch.setattr(plots, "save_png", lambda figure, path: (drawn.append(figure), save(figure, path)))
    (tmp_path / "curve.png").write_text("old")
    plots.plot_training(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    losses, by_range, rate = drawn[0].axes
    curves = {line.get_label(): list(line.get_ydata()) for line in losses.lines}
    assert curves["validation, averaged weights"] == [record["val_loss"] for record in validated]
    assert "stopped: step 12" in curves
    assert f"best: step {min(validated, key=lambda r: r['val_loss'])['step']}" in curves
    assert list(rate.lines[0].get_ydata()) == [record["lr"] for record in found["history"]]
    bar = found["isotropic_val_loss_by_range"]
    for number, line in enumerate(by_range.lines[:5]):
        assert list(line.get_ydata()) == [r["val_loss_by_range"][number] / bar[number] for r in validated]


def test_notes_name_what_was_not_learned():
    found = {
        "config": {"recipe": {"trained_on": "text", "start_timestep": 100}},
        "history": [{"loss": 2.0, "val_loss": 0.4}, {"loss": 1.0, "val_loss": 0.2}],
        "best_val_loss": 0.2,
        "isotropic_val_loss": 0.3,
        "ranges": [[0, 499], [500, 999]],
        "val_loss_by_range": [0.3, 0.1],
        "isotropic_val_loss_by_range": [0.5, 0.1],
    }
    (note,) = notes(found)
    assert note.startswith("at timesteps 500-999 the network is no better")
    assert note.endswith("below 100")
    nothing = {**found, "isotropic_val_loss": 0.1}
    assert "0.2000, is not below 0.1000, the loss of the isotropic estimate" in notes(nothing)[0]
    assert "more --train-steps" in notes(nothing)[0]
    turned = [*found["history"], {"loss": 0.5, "val_loss": 0.3}]
    assert "--denoiser gaussian" in notes({**nothing, "history": turned})[0]
    of_pairs = {"recipe": {"trained_on": "pairs", "start_timestep": 100}}
    said = notes({**nothing, "history": turned, "config": of_pairs})[0]
    assert "memorised" in said
    assert "gaussian" not in said, "pairs have no closed form"
    assert "lower --learning-rate" in notes({**nothing, "history": [*turned, {"loss": 3.0, "val_loss": 5.0}]})[0]
    assert notes({**found, "isotropic_val_loss_by_range": [0.5, 0.2]}) == []

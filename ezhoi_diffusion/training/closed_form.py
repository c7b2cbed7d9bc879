"""Bridges whose denoiser is a closed form of the rows: nothing is trained, and the rest is as after a training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ezhoi_diffusion.artifact import CONFIG, Artifact
from ezhoi_diffusion.diffusion.artifact import BRIDGE
from ezhoi_diffusion.diffusion.bridge import BridgeConfig, DiffusionBridge, build_denoiser
from ezhoi_diffusion.diffusion.closed_form import Empirical, Gaussian
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.files import current, write_json
from ezhoi_diffusion.rng import generator
from ezhoi_diffusion.training.config import TrainConfig, TrainingError
from ezhoi_diffusion.training.data import Rows, TrainingData, training_rows
from ezhoi_diffusion.training.loop import CHECKPOINTS, FACTS
from ezhoi_diffusion.training.loss import Validation

SAMPLE = 65_536  # of more rows a sample says the same of a mean and a covariance


def fit_bridge(data: TrainingData, config: TrainConfig, out: Path, registry: Components) -> None:
    """Fit the configured closed form, and write the artefact and training.json into `out`.

    Where `out` holds this very fit already, nothing is done. The validation loss is that of a fit without the held-out rows.
    The bridge itself knows all text rows, because one of a class that is missing could not be given back; of visual rows it
    knows the training part. Raises TrainingError for a recipe whose rows the closed form does not fit and for a folder with
    anything else, and what the denoiser raises.
    """
    rows = training_rows(data, config)
    if current(out, CONFIG).exists() or (out / CHECKPOINTS).exists():
        _require_same(out, config, rows)
        return
    if rows.paired:
        raise TrainingError(
            f"recipe {config.recipe.name!r} mixes texts with visual rows, and {config.denoiser} is the posterior mean under Gaussian "
            f"noise: choose a recipe that learns from text, or the denoiser mlp"
        )
    text = config.recipe.trained_on == "text"
    if config.denoiser == "empirical" and not text:
        raise TrainingError(
            f"texts is the posterior mean over stored texts, and recipe {config.recipe.name!r} learns from visual rows: choose a "
            f"recipe that learns from text, e.g. gentle"
        )
    validation = Validation.of(rows, config.bridge_config(rows.source.shape[1]).schedule(), config)
    known = _sample(rows.training, config.seed)
    ranges = validation.losses(_fitted(config, rows, known, registry)[1])
    everything = torch.arange(len(rows.source)) if text else known
    bridge_config, denoiser = _fitted(config, rows, everything, registry)
    bars = validation.bar()
    facts: dict[str, Any] = {
        "config": config.to_dict(),
        "step": 0,
        "val_loss": fmean(ranges),
        "isotropic_val_loss": fmean(bars),
        "ranges": validation.ranges,
        "val_loss_by_range": ranges,
        "isotropic_val_loss_by_range": bars,
        "rows": len(everything),
        "data_sha256": rows.fingerprint,
        "stopped": f"{config.denoiser} is a closed form: there is nothing to train",
    }
    bridge = DiffusionBridge(
        replace(bridge_config, provenance={**data.provenance, "training": facts}),
        denoiser,
        data.statistics,
        sampler=registry.samplers[config.recipe.sampler],
        context=data.context,
    )
    write_json(out / FACTS, {**facts, "history": []})
    bridge.save_pretrained(out)


def _fitted(config: TrainConfig, rows: Rows, numbers: Tensor, registry: Components) -> tuple[BridgeConfig, nn.Module]:
    bridge_config = config.bridge_config(rows.source.shape[1])
    if config.denoiser == "empirical":
        if "rows" in config.denoiser_options:
            raise TrainingError("texts stores all texts there are: leave `rows` out of denoiser_options")
        bridge_config = replace(bridge_config, denoiser_options={**config.denoiser_options, "rows": len(numbers)})
    denoiser = build_denoiser(bridge_config, registry)
    assert isinstance(denoiser, (Gaussian, Empirical))
    denoiser.fit(rows[numbers])
    return bridge_config, denoiser


def _sample(numbers: Tensor, seed: int) -> Tensor:
    order = torch.randperm(len(numbers), generator=generator(seed, "closed form"))
    return numbers[order[:SAMPLE].sort().values]


def _require_same(out: Path, config: TrainConfig, rows: Rows) -> None:
    """Raises TrainingError unless `out` holds this very fit."""
    training = Artifact.load(out, BRIDGE).provenance.get("training") if current(out, CONFIG).exists() else None
    then = training if isinstance(training, dict) else {}
    if (
        (out / CHECKPOINTS).exists()
        or then.get("data_sha256") != rows.fingerprint
        or config.departures(then.get("config", {}))
    ):
        raise TrainingError(f"{out} holds another training: choose another folder, or resume that one as it was begun")

"""Bridges whose denoiser is fitted instead of trained. The folder is the same as after a training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.artifact import CONFIG, Artifact
from ezhoi_diffusion.diffusion.artifact import BRIDGE
from ezhoi_diffusion.diffusion.bridge import DiffusionBridge, build_denoiser
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.diffusion.denoiser import FittedDenoiser
from ezhoi_diffusion.files import current, write_json
from ezhoi_diffusion.rng import generator
from ezhoi_diffusion.training.config import TrainConfig, TrainingError
from ezhoi_diffusion.training.data import TrainingData, TrainingSet
from ezhoi_diffusion.training.facts import FACTS
from ezhoi_diffusion.training.loop import CHECKPOINTS
from ezhoi_diffusion.training.validation import Validation

MAX_SAMPLE = 65_536  # of more features, a sample estimates mean and covariance as well


def fit_bridge(data: TrainingData, config: TrainConfig, out: Path, registry: Components) -> None:
    """Fit the configured denoiser, and write the artefact and training.json into `out`.

    The validation loss is that of a fit without the held-out features. The bridge itself is fitted to all of them. Nothing is
    done where `out` holds this very fit.

    Raises:
        TrainingError: The denoiser cannot be fitted with this recipe, or `out` holds something else.
        DenoiserError: The denoiser refuses the features.
    """
    features = TrainingSet.from_data(data, config)
    if current(out, CONFIG).exists() or (out / CHECKPOINTS).exists():
        _require_same(out, config, features)
        return
    if features.paired:
        raise TrainingError(
            f"recipe {config.recipe.name!r} mixes texts with visual features, and {config.denoiser} assumes Gaussian noise: "
            f"choose a recipe that learns from text, or the denoiser mlp"
        )
    if features.labelled is not None:
        raise TrainingError(
            f"recipe {config.recipe.name!r} learns through EZ-HOI's score, and {config.denoiser} is fitted without it: choose a "
            f"recipe that learns from text, or the denoiser mlp"
        )
    without_held_out = _fitted(config, features, _sample(features.training, config.seed), registry)
    if without_held_out.memorizes and config.recipe.trained_on != "text":
        raise TrainingError(
            f"{config.denoiser} returns stored texts, and recipe {config.recipe.name!r} learns from visual features: choose a "
            f"recipe that learns from text, e.g. gentle"
        )
    validation = Validation.from_features(features, config)
    losses, baseline = validation.losses(without_held_out), validation.baseline_losses()
    known = _sample(features.whole().training, config.seed)
    denoiser = _fitted(config, features, known, registry)
    facts: dict[str, Any] = {
        "config": config.to_dict(),
        "step": 0,
        "val_loss": fmean(losses),
        "isotropic_val_loss": fmean(baseline),
        "ranges": validation.ranges,
        "val_loss_by_range": losses,
        "isotropic_val_loss_by_range": baseline,
        "rows": len(known),
        "val_rows": len(features.validation),
        "data_sha256": features.fingerprint,
        "stopped": f"{config.denoiser} is fitted in closed form: there is nothing to train",
    }
    bridge_config = config.bridge_config(features.dim)
    bridge = DiffusionBridge(
        replace(bridge_config, denoiser_options={**config.denoiser_options, **denoiser.fitted_options()}),
        denoiser,
        data.statistics,
        registry=registry,
        provenance={**data.provenance, "training": facts},
        context=data.context,
    )
    write_json(out / FACTS, {**facts, "history": []})
    bridge.save_pretrained(out)


def _fitted(config: TrainConfig, features: TrainingSet, indices: Tensor, registry: Components) -> FittedDenoiser:
    """Build the denoiser and fit it. Raises TrainingError for an option that the fit sets."""
    denoiser = build_denoiser(config.bridge_config(features.dim), registry)
    assert isinstance(denoiser, FittedDenoiser)
    denoiser.fit(features[indices])
    taken = sorted(set(denoiser.fitted_options()) & set(config.denoiser_options))
    if taken:
        raise TrainingError(
            f"the features set {', '.join(taken)} of {config.denoiser}: leave it out of denoiser_options"
        )
    return denoiser


def _sample(indices: Tensor, seed: int) -> Tensor:
    order = torch.randperm(len(indices), generator=generator(seed, "closed form"))
    return indices[order[:MAX_SAMPLE].sort().values]


def _require_same(out: Path, config: TrainConfig, features: TrainingSet) -> None:
    """Raise TrainingError unless `out` holds this very fit."""
    training = Artifact.load(out, BRIDGE).provenance.get("training") if current(out, CONFIG).exists() else None
    before = training if isinstance(training, dict) else {}
    if (
        (out / CHECKPOINTS).exists()
        or before.get("data_sha256") != features.fingerprint
        or config.departures(before.get("config", {}))
    ):
        raise TrainingError(f"{out} holds another training: choose another folder, or resume that training as it began")

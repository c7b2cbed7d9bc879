"""What a bridge is trained on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.diffusion.normalization import normalize
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.training.config import TrainConfig, TrainingError
from ezhoi_diffusion.training.order import split

BLOCK = 65536


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Captured embeddings as they are, not normalised, on the CPU: visual [N, D], image [N] int64, text [N_sel, D].

    `visual` may be mapped from disk: only a batch of it is in memory at a time. `provenance` (JSON) and
    `context` (the host's context vectors) go into the artefact.
    """

    visual: Tensor
    image: Tensor
    text: Tensor
    statistics: ModalityStatistics
    provenance: dict[str, Any] = field(default_factory=dict)
    context: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one side that a run learns from, with the mean that they lose, and their split."""

    source: Tensor
    mean: Tensor
    scale: float
    training: Tensor
    validation: Tensor
    fingerprint: str

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """Normalised rows [n, D] of norm `scale`, float32."""
        return normalize(self.source[numbers].float(), self.mean, self.scale)[0]


def training_rows(data: TrainingData, config: TrainConfig) -> Rows:
    """Text rows split by row, or visual rows split by image. Raises TrainingError for unusable data."""
    recipe, statistics = config.recipe, data.statistics
    if recipe.trained_on == "text":
        source, groups, mean, what = data.text, torch.arange(len(data.text)), statistics.text_mean, "text rows"
    else:
        means = {"visual": statistics.visual_mean, "text": statistics.text_mean}
        source, groups, mean, what = data.visual, data.image, means[recipe.input_mean], "images"
    if source.ndim != 2 or source.shape[1] != statistics.dim or groups.shape != source.shape[:1]:
        raise TrainingError(
            f"{recipe.trained_on} embeddings must be [N, {statistics.dim}] with one group each, "
            f"not {list(source.shape)} with {list(groups.shape)}"
        )
    digest = hashlib.sha256()
    for block in (*source.split(BLOCK), mean):
        if not torch.isfinite(block).all():
            raise TrainingError(f"{recipe.trained_on} embeddings hold NaN or infinity: capture them anew")
        digest.update(block.contiguous().numpy().tobytes())
    try:
        training, validation = split(groups, config.val_fraction, config.seed)
    except ValueError as error:
        raise TrainingError(f"too few {what}: {error}") from error
    return Rows(source, mean, recipe.scale, training, validation, digest.hexdigest())

"""What a bridge is trained on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.diffusion.normalization import normalize, rescale
from ezhoi_diffusion.features.split import validation_mask
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.training.config import TrainConfig, TrainingError

BLOCK = 65536


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Captured embeddings as they are, not normalised, on the CPU: visual [N, D], image [N] int64, text [N_sel, D].

    `visual` may be mapped from disk: only a batch of it is in memory at a time. `own_text` [N, D] is the text of each
    visual row's own class, for what is trained on pairs. `images`: of how many the rows are, some of which may have none.
    `provenance` (JSON) and `context` (the host's context vectors) go into the artefact.
    """

    visual: Tensor
    image: Tensor
    text: Tensor
    statistics: ModalityStatistics
    provenance: dict[str, Any] = field(default_factory=dict)
    context: dict[str, Tensor] = field(default_factory=dict)
    own_text: Tensor | None = None
    images: int | None = None


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that a run learns to return, with the mean that they lose, and their split.

    noised_to: what noise turns a row into. None: Gaussian noise itself. For pairs the visual rows [N, D], with their mean,
    blurred by Gaussian noise of `blur` times their norm: level T is then where a visual feature is, and level 0 its text.
    """

    source: Tensor
    mean: Tensor
    scale_factor: float
    training: Tensor
    validation: Tensor
    fingerprint: str
    endpoint: tuple[Tensor, Tensor] | None = None
    noise_scale: float = 0.0

    @property
    def paired(self) -> bool:
        """Whether the rows are learned from pairs."""
        return self.endpoint is not None

    def resident(self, device: torch.device) -> Tensor | None:
        """All rows normalised [N, D] on the device, where they are few or the device is not the CPU; else None.

        A CPU takes them batch by batch, because they may be mapped from disk and larger than its memory.
        """
        if self.paired or (device.type == "cpu" and len(self.source) > BLOCK):
            return None
        return torch.cat([self[numbers].to(device) for numbers in torch.arange(len(self.source)).split(BLOCK)])

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """Normalised rows [n, D] of norm `scale`, float32."""
        return normalize(self.source[numbers].float(), self.mean, self.scale_factor)[0]

    def noise(self, numbers: Tensor, gaussian: Tensor) -> Tensor:
        """What rows are mixed with [n, D]: standard normal `gaussian`, or what it makes of their visual rows."""
        if self.endpoint is None:
            return gaussian
        visual, mean = self.endpoint
        z = normalize(visual[numbers].float(), mean, self.scale_factor)[0]
        return rescale(
            z + self.noise_scale * self.scale_factor / gaussian.shape[1] ** 0.5 * gaussian, self.scale_factor
        )


def training_rows(data: TrainingData, config: TrainConfig) -> Rows:
    """Text rows split by row, or visual rows and pairs split by image. Raises TrainingError for unusable data."""
    recipe, statistics = config.recipe, data.statistics
    endpoint = None
    if recipe.trained_on == "text":
        source, mean, what = data.text, statistics.text_mean, "text rows"
        groups, count, seed = torch.arange(len(data.text)), len(data.text), config.seed
    else:
        means = {"visual": statistics.visual_mean, "text": statistics.text_mean}
        source, mean, what = data.visual, means[recipe.input_mean], "images"
        groups, seed = data.image, 0
        count = data.images if data.images is not None else int(groups.max()) + 1 if len(groups) else 0
        if recipe.trained_on == "pairs":
            if data.own_text is None:
                raise TrainingError(
                    f"recipe {recipe.name!r} learns from pairs, and the data hold no text of a row's own class"
                )
            endpoint = (source, mean)
            source, mean = data.own_text, statistics.text_mean
    if source.ndim != 2 or source.shape[1] != statistics.dim or groups.shape != source.shape[:1]:
        raise TrainingError(
            f"{recipe.trained_on} embeddings must be [N, {statistics.dim}] with one group each, "
            f"not {list(source.shape)} with {list(groups.shape)}"
        )
    digest = hashlib.sha256()
    for part in (source, *(endpoint or ())):
        for block in (*part.split(BLOCK), mean):
            if not torch.isfinite(block).all():
                raise TrainingError(f"{recipe.trained_on} embeddings hold NaN or infinity: capture them anew")
            digest.update(block.contiguous().numpy().tobytes())
    try:
        apart = validation_mask(count, config.val_fraction, seed)[groups]
    except ValueError as error:
        raise TrainingError(f"too few {what}: {error}") from error
    training, validation = (part.nonzero().squeeze(1) for part in (~apart, apart))
    if len(training) == 0 or len(validation) == 0:
        raise TrainingError(
            f"of {len(groups)} rows {len(training)} are left to train on and {len(validation)} to validate with: capture "
            f"more images, or give another --val-fraction"
        )
    return Rows(
        source, mean, recipe.scale_factor, training, validation, digest.hexdigest(), endpoint, recipe.noise_augmentation
    )

"""The two means that every normalization needs, and the modality gap between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion.schema import TensorSpec

TABLE = {  # of statistics.safetensors
    "visual_mean": TensorSpec(torch.float32, "D", -1, 1),
    "text_mean": TensorSpec(torch.float32, "D", -1, 1),
    "rows": TensorSpec(torch.int64, "2", 0, 2**53),
}
PART = 512  # features: 2 MB at D = 512
CANCELLED = 1e-6  # squared distance below which a difference of squares has lost more than half of its digits
EPS = 1e-12  # smallest norm that is divided by, as torch's `normalize` has it


def unit_mean(text: Tensor) -> Tensor:
    """Mean [D] float32 of the unit text features of [N_sel, D]. Raises ValueError where there is none."""
    if len(text) == 0:
        raise ValueError("statistics need features on both sides, found no text feature")
    return normalize(text.double(), dim=-1).mean(0).float()


def mean_resultant_lengths(blocks: Iterable[Tensor], means: Sequence[Tensor]) -> list[float]:
    """For each mean, the norm of the mean of unit(unit(x) − mean) over all features: what they share beyond it.

    Args:
        blocks: Features [n, D].
        means: [D] each.

    Returns:
        0 to 1 each: about 0 where features spread evenly around the mean, large where a cone is left.
    """
    around = torch.stack([*means]).double()
    totals, count = torch.zeros_like(around), 0
    for block in blocks:
        totals += unit_sums(block, around)[1]
        count += len(block)
    return [float(total.norm()) for total in totals / count]


def unit_sums(features: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over features x [n, D] of u = unit(x), and of unit(u − mean) for each of K means, in float64.

    They are weighted sums of x and mean: |u − mean|² is |u|² − 2·u·mean + |mean|². No unit feature is written down.

    Args:
        features: [n, D].
        means: [K, D] float64.

    Returns:
        [D] and [K, D].
    """
    total, around = means.new_zeros(means.shape[1]), torch.zeros_like(means)
    for part in features.split(PART):  # stays in the processor's cache
        x = part.double()
        norm = torch.linalg.vector_norm(x, dim=1)
        scale = norm.clamp_min(EPS).reciprocal()
        total += scale @ x
        square = (norm * scale).square().unsqueeze(1) - 2 * scale.unsqueeze(1) * (x @ means.T) + means.square().sum(1)
        if (square < CANCELLED).any():  # nothing is left of the digits of this difference
            unit = scale.unsqueeze(1) * x
            around += torch.stack([normalize(unit - mean, dim=1).sum(0) for mean in means])
            continue
        weight = square.sqrt().reciprocal()
        around += (weight * scale.unsqueeze(1)).T @ x - weight.sum(0).unsqueeze(1) * means
    return total, around


@dataclass(frozen=True)
class ModalityStatistics:
    """Means of the *unit* features of both modalities, not renormalised.

    The norm of such a mean is the root of the mean pairwise cosine: about 0.7-0.9 for CLIP text.

    Attributes:
        visual_mean: [D] float32; zeros where it is unknown, as with some imported files.
        text_mean: [D] float32.
        visual_rows: Number of pair features in the visual mean; 0 where it is unknown.
        text_rows: Number of text features in the text mean; 0 where that is unknown.
    """

    visual_mean: Tensor
    text_mean: Tensor
    visual_rows: int
    text_rows: int

    @classmethod
    def compute(cls, visual: Iterable[Tensor], text: Tensor) -> ModalityStatistics:
        """Compute both means in float64, as a stream.

        Args:
            visual: Blocks of pair features [n, D].
            text: Text features [N_sel, D].

        Raises:
            ValueError: Either side is empty.
        """
        return cls.compute_with_text_mean(visual, unit_mean(text), len(text))

    @classmethod
    def compute_with_text_mean(cls, visual: Iterable[Tensor], text_mean: Tensor, text_rows: int) -> ModalityStatistics:
        """Compute the visual mean where the text mean [D] is known. Raises ValueError without pair features."""
        total = torch.zeros(len(text_mean), dtype=torch.float64)
        no_mean, count = total.new_zeros(0, len(total)), 0
        for block in visual:
            total += unit_sums(block, no_mean)[0]
            count += len(block)
        if count == 0:
            raise ValueError("statistics need features on both sides, found no pair feature")
        return cls((total / count).float(), text_mean, count, text_rows)

    @classmethod
    def text_only(cls, text_mean: Tensor, text_rows: int = 0) -> ModalityStatistics:
        """Statistics without a visual mean."""
        return cls(torch.zeros_like(text_mean), text_mean, 0, text_rows)

    @property
    def visual_known(self) -> bool:
        """Whether the visual mean is known."""
        return self.visual_rows > 0

    @property
    def dim(self) -> int:
        """D, the width of a feature."""
        return self.visual_mean.shape[0]

    @property
    def gap(self) -> float:
        """Distance between the two means: the modality gap of Liang et al. (NeurIPS 2022). NaN where one is unknown."""
        if not self.visual_known:
            return math.nan
        return float((self.visual_mean - self.text_mean).norm())

    def tensors(self) -> dict[str, Tensor]:
        """Content of an artefact's statistics.safetensors."""
        return {
            "visual_mean": self.visual_mean.contiguous(),
            "text_mean": self.text_mean.contiguous(),
            "rows": torch.tensor([self.visual_rows, self.text_rows]),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> ModalityStatistics:
        """Invert `tensors`, which fit `TABLE`."""
        visual_rows, text_rows = tensors["rows"].tolist()
        return cls(tensors["visual_mean"], tensors["text_mean"], visual_rows, text_rows)

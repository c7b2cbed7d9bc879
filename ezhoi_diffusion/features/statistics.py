"""The two means that every normalization needs, and what they say of the modality gap."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-12


def unit(x: Tensor) -> Tensor:
    """Rows of x [N, D] divided by max(|row|, 1e-12): the first link of the normalization chain."""
    rows: Tensor = x / x.norm(dim=-1, keepdim=True).clamp_min(EPS)
    return rows


def mean_resultant_length(blocks: Iterable[Tensor], mean: Tensor) -> float:
    """What all rows [n, D] have in common once `mean` [D] is taken off: the norm of the mean of unit(unit(x) − mean).

    0 to 1: about 0 where rows spread evenly around the mean, large where a cone is left.
    """
    total, count = torch.zeros(len(mean), dtype=torch.float64), 0
    for rows in blocks:
        total += unit(unit(rows.double()) - mean.double()).sum(0)
        count += len(rows)
    return float((total / count).norm())


@dataclass(frozen=True)
class ModalityStatistics:
    """Means of the *unit* rows of both modalities, not renormalised (float32, [D]).

    The norm of such a mean is the root of the mean pairwise cosine: about 0.7-0.9 for CLIP text.
    `visual_rows` is 0, and the visual mean a zero vector, where only the text mean is known, as with some imported files;
    `text_rows` is 0 where it is not known of how many rows the text mean is the mean.
    """

    visual_mean: Tensor
    text_mean: Tensor
    visual_rows: int
    text_rows: int

    @classmethod
    def of(cls, visual: Iterable[Tensor], text: Tensor) -> ModalityStatistics:
        """Streams over blocks of visual rows ([n, D] each) and over text rows [N_sel, D], in float64.

        Raises ValueError where either side has no row.
        """
        if len(text) == 0:
            raise ValueError("statistics need rows on both sides, found no text row")
        return cls.around(visual, unit(text.double()).mean(0).float(), len(text))

    @classmethod
    def around(cls, visual: Iterable[Tensor], text_mean: Tensor, text_rows: int) -> ModalityStatistics:
        """As `of`, where the text mean [D] is known already. Raises ValueError where there is no visual row."""
        total = torch.zeros(len(text_mean), dtype=torch.float64)
        rows = 0
        for block in visual:
            total += unit(block.double()).sum(0)
            rows += len(block)
        if rows == 0:
            raise ValueError("statistics need rows on both sides, found no visual row")
        return cls((total / rows).float(), text_mean, rows, text_rows)

    @classmethod
    def text_only(cls, text_mean: Tensor, text_rows: int = 0) -> ModalityStatistics:
        """What is known where no visual row is: the text mean [D]."""
        return cls(torch.zeros_like(text_mean), text_mean, 0, text_rows)

    @property
    def visual_known(self) -> bool:
        """Whether the visual mean is one."""
        return self.visual_rows > 0

    @property
    def dim(self) -> int:
        """D, the embedding width."""
        return self.visual_mean.shape[0]

    @property
    def gap(self) -> float:
        """Distance between the two means: the modality gap of Liang et al. (NeurIPS 2022). NaN where one is unknown."""
        if not self.visual_known:
            return math.nan
        return float((self.visual_mean - self.text_mean).norm())

    def tensors(self) -> dict[str, Tensor]:
        """What `statistics.safetensors` of an artefact holds."""
        return {
            "visual_mean": self.visual_mean.contiguous(),
            "text_mean": self.text_mean.contiguous(),
            "rows": torch.tensor([self.visual_rows, self.text_rows]),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> ModalityStatistics:
        """The inverse of `tensors`. Raises KeyError where one is missing, ValueError where one is something else."""
        visual_rows, text_rows = tensors["rows"].tolist()
        for name in ("visual_mean", "text_mean"):
            if tensors[name].dtype != torch.float32 or tensors[name].ndim != 1:
                raise ValueError(f"{name} is {tensors[name].dtype} of shape {list(tensors[name].shape)}")
        return cls(tensors["visual_mean"], tensors["text_mean"], int(visual_rows), int(text_rows))

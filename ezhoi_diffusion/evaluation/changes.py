"""Changes of AP in single classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ezhoi_diffusion.evaluation.comparison import FULL, REFERENCE, Comparison

EQUAL = 1e-9  # points; equal detections in equal order give equal AP to rounding


@dataclass(frozen=True, eq=False)
class Changes:
    """Differences in AP to bare EZ-HOI of k annotated classes, the largest gain first.

    Attributes:
        classes: [k] int64.
        points: Differences [k] float64, in percentage points.
        bounds: Interval of each, [k, 2]; None without a bootstrap.
    """

    classes: Tensor
    points: Tensor
    bounds: Tensor | None

    @property
    def sign(self) -> Tensor:
        """[k]: 1 a gain, -1 a loss, 0 unchanged."""
        return torch.where(self.points.abs() <= EQUAL, 0, self.points.sign().long())

    @property
    def certain(self) -> Tensor:
        """[k] bool: the interval excludes 0."""
        if self.bounds is None:
            return torch.zeros(len(self.points), dtype=torch.bool)
        return (self.bounds[:, 0] > 0) | (self.bounds[:, 1] < 0)

    def counts(self) -> dict[str, int]:
        """Count gains, losses and unchanged classes. The interval of a certain gain or loss excludes 0."""
        gains, losses = self.sign > 0, self.sign < 0
        return {
            "gains": int(gains.sum()),
            "losses": int(losses.sum()),
            "unchanged": int((~gains & ~losses).sum()),
            "certain gains": int((gains & self.certain).sum()),
            "certain losses": int((losses & self.certain).sum()),
        }


def changes(comparison: Comparison, variant: str) -> Changes:
    """The changes that `variant` makes to the classes of the full group that are annotated."""
    classes = comparison.groups[FULL]
    classes = classes[comparison.annotations[classes] > 0]
    points = (comparison.variants[variant].ap - comparison.variants[REFERENCE].ap)[classes].double() * 100
    order = points.argsort(descending=True, stable=True)
    bootstrap = comparison.variants[variant].bootstrap
    per_class = None if bootstrap is None else bootstrap.per_class
    bounds = None if per_class is None else per_class[classes[order]]
    return Changes(classes[order], points[order], bounds)

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
        certain: [k] bool: a change that is no chance, at the false discovery rate of `discoveries`.
    """

    classes: Tensor
    points: Tensor
    bounds: Tensor | None
    certain: Tensor

    @property
    def sign(self) -> Tensor:
        """[k]: 1 a gain, -1 a loss, 0 unchanged."""
        return torch.where(self.points.abs() <= EQUAL, 0, self.points.sign().long())

    def counts(self) -> dict[str, int]:
        """Count gains, losses and unchanged classes. Of all that are certain, at most 1 − level are false on average."""
        gains, losses = self.sign > 0, self.sign < 0
        return {
            "gains": int(gains.sum()),
            "losses": int(losses.sum()),
            "unchanged": int((~gains & ~losses).sum()),
            "certain gains": int((gains & self.certain).sum()),
            "certain losses": int((losses & self.certain).sum()),
        }


def changes(comparison: Comparison, name: str) -> Changes:
    """The changes that a bridge makes to the classes of the full group that are annotated."""
    classes = comparison.groups[FULL]
    classes = classes[comparison.annotations[classes] > 0]
    bridge, bare = comparison.bridges[name], comparison.variants[REFERENCE]
    points = (bridge.ap - bare.ap)[classes].double() * 100
    order = points.argsort(descending=True, stable=True)
    bootstrap = bridge.bootstrap
    if bootstrap is None or bootstrap.per_class is None or bootstrap.per_class_p is None:
        return Changes(classes[order], points[order], None, torch.zeros(len(order), dtype=torch.bool))
    certain = discoveries(bootstrap.per_class_p[classes[order]], 1 - comparison.level)
    return Changes(classes[order], points[order], bootstrap.per_class[classes[order]], certain)


def discoveries(p: Tensor, rate: float) -> Tensor:
    """Which of the p-values [k] count at this false discovery rate, [k] bool (Benjamini & Hochberg 1995). NaN never does."""
    known = p[~p.isnan()].sort().values
    below = (known <= rate * torch.arange(1, 1 + len(known)) / max(len(known), 1)).nonzero()
    return p <= known[int(below[-1])] if len(below) else torch.zeros(len(p), dtype=torch.bool)

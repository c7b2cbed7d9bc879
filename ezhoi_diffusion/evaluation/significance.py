"""Whether a difference in mean AP is more than chance: a paired bootstrap over images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """A difference in mean AP to the reference, in points: its interval, and p-values (two-sided).

    p_adjusted holds for all variants of the comparison together, p for this one alone.
    """

    low: float
    high: float
    p: float
    p_adjusted: float


@dataclass(frozen=True, eq=False)
class Significance:
    """What a paired bootstrap says, for K interaction classes.

    mean_ap: variant -> group -> interval of mean AP, percent. difference: variant (all but the reference) -> group.
    per_class: variant (all but the reference) -> [K, 2] interval of the class's difference, points; NaN for a class
    without annotation.
    """

    replicates: int
    level: float
    seed: int
    mean_ap: dict[str, dict[str, tuple[float, float]]]
    difference: dict[str, dict[str, Difference]]
    per_class: dict[str, Tensor]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; NaN is null."""
        from dataclasses import asdict

        return {
            "replicates": self.replicates,
            "level": self.level,
            "seed": self.seed,
            "mean_ap": {v: {g: list(i) for g, i in groups.items()} for v, groups in self.mean_ap.items()},
            "difference": {v: {g: asdict(d) for g, d in groups.items()} for v, groups in self.difference.items()},
            "per_class": {
                v: [None if low != low else [low, high] for low, high in bounds.tolist()]
                for v, bounds in self.per_class.items()
            },
        }

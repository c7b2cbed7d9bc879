"""Fidelity: how close a cheaper evaluation of a bridge comes to its reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Fidelity:
    """Agreement of features with reference features.

    Attributes:
        cosine: Mean cosine to the reference.
        cosine_min: Lowest cosine to the reference.
        top1: Share of features with the same nearest text.
        rows: Number of features.
    """

    cosine: float
    cosine_min: float
    top1: float
    rows: int

    def __str__(self) -> str:
        return (
            f"cosine {self.cosine:.4f} (lowest {self.cosine_min:.4f}), same nearest text for {100 * self.top1:.1f} % of "
            f"{self.rows} features"
        )


def fidelity(found: Tensor, reference: Tensor, text: Tensor) -> Fidelity:
    """Compare bridged directions with a reference. Lengths do not count.

    Args:
        found: Directions [N, D].
        reference: Directions [N, D] to compare with.
        text: Centred directions of the texts, [K, D]. The nearest text has the highest cosine.
    """
    found, reference, text = F.normalize(found, dim=-1), F.normalize(reference, dim=-1), F.normalize(text, dim=-1)
    cosine = (found * reference).sum(1)
    same = (found @ text.T).argmax(1) == (reference @ text.T).argmax(1)
    return Fidelity(float(cosine.mean()), float(cosine.min()), float(same.float().mean()), len(found))

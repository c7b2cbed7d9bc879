"""How near a cheaper evaluation of a bridge comes to the one it stands for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Fidelity:
    """Over rows: mean and lowest cosine to the reference, and the share whose nearest text is the same."""

    cosine: float
    cosine_min: float
    top1: float
    rows: int

    def __str__(self) -> str:
        return (
            f"cosine {self.cosine:.4f} (lowest {self.cosine_min:.4f}), same nearest text for {100 * self.top1:.1f} % of "
            f"{self.rows} rows"
        )


def fidelity(found: Tensor, reference: Tensor, text: Tensor) -> Fidelity:
    """Of bridged directions found [N, D] to reference [N, D], text [K, D] being centred directions of the texts.

    The nearest text is that of the highest cosine. Lengths count for nothing.
    """
    found, reference, text = normalize(found), normalize(reference), normalize(text)
    cosine = (found * reference).sum(1)
    same = (found @ text.T).argmax(1) == (reference @ text.T).argmax(1)
    return Fidelity(float(cosine.mean()), float(cosine.min()), float(same.float().mean()), len(found))

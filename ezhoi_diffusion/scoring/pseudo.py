"""`pseudo`: hidden interactions, learned from unlabelled training pairs that EZ-HOI is surest of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.bridge import BridgeError
from ezhoi_diffusion.features.images import stored_images
from ezhoi_diffusion.features.labels import labelled_pairs, seen_targets
from ezhoi_diffusion.features.score import EzHoiScore
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.schema import TensorSpec
from ezhoi_diffusion.scoring.bridge import WeightedBridge, checked_number, load_artifact, score_files
from ezhoi_diffusion.scoring.linear import shrunk

if TYPE_CHECKING:
    from ezhoi_diffusion.features.batch import Pairs

NAME = "pseudo"
TENSORS = "pseudo.safetensors"
TABLE = {
    "map": TensorSpec(torch.float64, "D C"),
    "bias": TensorSpec(torch.float64, "C"),
    "hidden": TensorSpec(torch.uint8, "O C", 0, 1),
}
GRID = {"weight": (0.05, 0.1, 0.2)}
COUNT = 20
SHARE = 0.25  # of the pairs that may show a hidden interaction, the most that count as showing it


class PseudoPositives(WeightedBridge):
    """z -> z + weight·(x·M − b) for interactions that the split hides; others stay.

    Source: pseudo-labels (Lee, "Pseudo-label", ICML workshop 2013), as positives of a linear discriminant.
    """

    needs_pairs = True
    protocol = "train-transductive"
    file = TENSORS
    grid = GRID
    map: Tensor  # [D, C]
    bias: Tensor  # [C]
    hidden: Tensor  # [O, C]

    def moved_logits(self, x: Tensor, logits: Tensor, pairs: Pairs | None) -> Tensor:
        """Add the linear term to the logits of hidden interactions, [P, C]."""
        assert pairs is not None
        hidden = self.hidden[pairs.objects.to(self.hidden.device)].bool()
        return logits + self.weight * torch.where(hidden, x @ self.map - self.bias, 0.0)


def mined(x: Tensor, confidence: Tensor, possible: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A linear discriminant of each class that may be mined: its surest pairs against all that may show it.

    M = Σ⁻¹(μ₊ − μ) and b = μ·M, with the mean μ of the pairs that may show the class, and μ₊ of the `count` surest of them (at
    most `SHARE`), weighted by their confidence. Σ is the shared covariance of all pairs.

    Args:
        x: Features of unlabelled pairs [N, D], float64.
        confidence: [N, C], at least 0.
        possible: Which classes each pair may show, [N, C] bool.
        count: The most pairs of a class.

    Returns:
        M [D, C] and b [C], float64; zero for a class without pairs.
    """
    within = x - x.mean(0)
    covariance = shrunk(within.T @ within / max(1, len(x)))
    difference, middle = torch.zeros(2, possible.shape[1], x.shape[1], dtype=torch.float64)
    for c in range(possible.shape[1]):
        rows = possible[:, c].nonzero().squeeze(1)
        best = min(count, int(SHARE * len(rows)))
        if best:
            surest = rows[confidence[rows, c].argsort(descending=True, stable=True)[:best]]
            weight = confidence[surest, c].double().clamp_min(1e-12)
            middle[c] = x[rows].mean(0)
            difference[c] = (weight / weight.sum()) @ x[surest] - middle[c]
    linear = torch.linalg.solve(covariance, difference.T)
    return linear, (middle * linear.T).sum(1)


def load(folder: Path | None) -> PseudoPositives:
    """Load the bridge in `folder`. Raises BridgeError."""
    return PseudoPositives(load_artifact(folder, NAME, {TENSORS: TABLE}))


def fit(features: FeatureStore, weight: float = 0.1, count: int = COUNT) -> Artifact:
    """Take training pairs without annotation that EZ-HOI is surest of as examples of the interactions that the split hides.

    It reads no annotation of a hidden interaction. But unlabelled training images show such interactions, so results are
    train-transductive: compare them with methods that use these images too. Where a run hides nothing it changes nothing.

    Args:
        features: A capture of the train split.
        weight: Of the discriminants' logits, which vary as much as EZ-HOI's at 1.
        count: The most examples of a verb.

    Raises:
        BridgeError: `count` is no whole number from 1.
    """
    weight = checked_number(NAME, {}, "weight", weight)
    if type(count) is not int or count < 1:
        raise BridgeError(f"{NAME}: count is a whole number from 1, not {count!r:.60}")
    features.require_all_texts(f"{NAME} finds examples by")
    score, pairs = EzHoiScore.from_store(features), labelled_pairs(features)
    hidden = score.object_to_target & ~seen_targets(features, score)
    objects = torch.cat([image.pairs.objects for image in stored_images(features)])
    unlabelled = ~pairs.target.any(1)
    x, possible = pairs.visual[unlabelled].double(), hidden[objects[unlabelled]]
    logits = x @ score.matrix.T
    linear, bias = mined(x, logits.sigmoid() * pairs.prior[unlabelled].unsqueeze(1), possible, count)
    moved = (x @ linear - bias)[possible]
    unit = logits.std() / moved.std().clamp_min(1e-12) if len(moved) > 1 else 1.0
    tensors = {"map": unit * linear, "bias": unit * bias, "hidden": hidden.to(torch.uint8)}
    return Artifact(NAME, {"weight": weight, "count": count}, {**score_files(features), TENSORS: tensors})

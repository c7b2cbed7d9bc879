"""`pseudo`: hidden interactions, learned from unlabelled training pairs that EZ-HOI is surest of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.bridge import BridgeError
from ezhoi_diffusion.features.labels import labelled_shards, seen_targets
from ezhoi_diffusion.features.rows import StoredRows
from ezhoi_diffusion.features.score import EzHoiScore
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.schema import TensorSpec
from ezhoi_diffusion.scoring.bridge import WeightedBridge, checked_number, load_artifact, score_files
from ezhoi_diffusion.scoring.linear import shrunk
from ezhoi_diffusion.scoring.moments import Scatter, std_of
from ezhoi_diffusion.scoring.surest import Surest

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


class Candidates(NamedTuple):
    """Unlabelled pairs of a block, and the classes that they may show.

    Attributes:
        rows: [n] int64, which pairs they are.
        x: [n, D] float64, their features.
        confidence: [n, C] float64, at least 0.
        possible: [n, C] bool.
    """

    rows: Tensor
    x: Tensor
    confidence: Tensor
    possible: Tensor


def mined(
    blocks: Iterable[Candidates], features: Tensor | StoredRows, classes: int, count: int
) -> tuple[Tensor, Tensor, Scatter]:
    """A linear discriminant of each class that may be mined: its surest pairs against all that may show it.

    M = Σ⁻¹(μ₊ − μ) and b = μ·M, with the mean μ of the pairs that may show the class, and μ₊ of the `count` surest of them (at
    most `SHARE`), weighted by their confidence. Σ is the shared covariance of all pairs.

    Args:
        blocks: The unlabelled pairs.
        features: [N, D], of all pairs; those of the surest are taken from it.
        classes: C.
        count: The most pairs of a class.

    Returns:
        M [D, C] and b [C], float64, zero for a class without pairs; and the scatter of the unlabelled pairs.
    """
    dim = features.shape[1]
    total, surest = Scatter.of(torch.zeros(0, dim)), Surest.none(classes)
    sums, number = torch.zeros(classes, dim, dtype=torch.float64), torch.zeros(classes, dtype=torch.long)
    for rows, x, confidence, possible in blocks:
        total, number, sums = total + Scatter.of(x), number + possible.sum(0), sums + possible.double().T @ x
        surest = surest.among(rows, torch.where(possible, confidence, -1.0), count)
    covariance = shrunk(total.products / max(1, total.count))
    difference, middle = torch.zeros(2, classes, dim, dtype=torch.float64)
    for c in range(classes):
        best = min(count, int(SHARE * int(number[c])))
        if best:
            weight = surest.confidence[:best, c].clamp_min(1e-12)
            middle[c] = sums[c] / number[c]
            difference[c] = (weight / weight.sum()) @ features[surest.rows[:best, c]].double() - middle[c]
    linear = torch.linalg.solve(covariance, difference.T)
    return linear, (middle * linear.T).sum(1), total


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
    score = EzHoiScore.from_store(features)
    hidden = score.object_to_target & ~seen_targets(features, score)

    def unlabelled() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        begin = 0
        for _, shard, labels in labelled_shards(features):
            rows = (~labels.target.any(1)).nonzero().squeeze(1)
            x, objects = shard["adapter_feat"][rows].double(), shard["objects"][rows].long()
            yield begin + rows, x, labels.prior[rows].unsqueeze(1), hidden[objects]
            begin += len(labels)

    blocks = (
        Candidates(rows, x, (x @ score.matrix.T).sigmoid() * prior, possible)
        for rows, x, prior, possible in unlabelled()
    )
    linear, bias, total = mined(blocks, StoredRows(features), hidden.shape[1], count)
    moved = std_of((x @ linear - bias)[possible] for _, x, _, possible in unlabelled())
    unit = total.std_of(score.matrix.T) / moved if moved > 0 else torch.ones(())
    tensors = {"map": unit * linear, "bias": unit * bias, "hidden": hidden.to(torch.uint8)}
    return Artifact(NAME, {"weight": weight, "count": count}, {**score_files(features), TENSORS: tensors})

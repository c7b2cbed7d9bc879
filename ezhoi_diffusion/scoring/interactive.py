"""`interactive`: annotated pairs against background, by the geometry of the pair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.features.images import image_of, shard_pairs
from ezhoi_diffusion.features.labels import labelled_shards, seen_targets
from ezhoi_diffusion.features.score import EzHoiScore
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.schema import TensorSpec
from ezhoi_diffusion.scoring.bridge import WeightedBridge, checked_number, load_artifact, score_files
from ezhoi_diffusion.scoring.geometry import GEOMETRY, pair_geometry

if TYPE_CHECKING:
    from ezhoi_diffusion.features.batch import Pairs

NAME = "interactive"
TENSORS = "interactive.safetensors"
TABLE = {
    "mean": TensorSpec(torch.float64, f"{len(GEOMETRY)}"),
    "spread": TensorSpec(torch.float64, f"{len(GEOMETRY)}", 1e-12),
    "coefficient": TensorSpec(torch.float64, f"{len(GEOMETRY) + 1}"),
}
GRID = {"weight": (0.5, 1.0, 1.5)}


class Interactive(WeightedBridge):
    """z -> z + λ·log P(annotated | geometry), for all verbs of a pair, with a logistic P on `GEOMETRY`.

    Source: the interactiveness of Li et al., "Transferable interactiveness knowledge for human-object interaction detection",
    CVPR 2019. There a network learns it from features too, which cost unseen classes what they gave seen ones.
    """

    needs_pairs = True
    file = TENSORS
    grid = GRID
    mean: Tensor  # [G]
    spread: Tensor  # [G]
    coefficient: Tensor  # [G + 1]

    def moved_logits(self, x: Tensor, logits: Tensor, pairs: Pairs | None) -> Tensor:
        """Add λ·log P to all logits [P, C]."""
        assert pairs is not None
        geometry = (pair_geometry(pairs).to(logits.device) - self.mean) / self.spread
        annotated = geometry @ self.coefficient[:-1] + self.coefficient[-1]
        return logits + self.weight * logsigmoid(annotated).unsqueeze(1)


def load(folder: Path | None) -> Interactive:
    """Load the bridge in `folder`. Raises BridgeError."""
    return Interactive(load_artifact(folder, NAME, {TENSORS: TABLE}))


def fit(features: FeatureStore, weight: float = 1.0) -> Artifact:
    """Learn from annotated pairs of seen classes, and from pairs without annotation, what an annotated pair is like.

    A pair without annotation may show a hidden interaction. So it counts as background only with the share of its softmax over
    the object's verbs that seen interactions hold. No annotation of a hidden interaction is used, and no image without another
    one, as in EZ-HOI's training.

    Args:
        features: A capture of the train split.
        weight: λ, the weight of log P.
    """
    from sklearn.linear_model import LogisticRegression

    weight = checked_number(NAME, {}, "weight", weight)
    score = EzHoiScore.from_store(features).of_texts(features.learnable_texts())
    unseen = features.ezhoi.get("classes/unseen", torch.zeros(0, dtype=torch.long))
    seen = seen_targets(features, score)
    geometry, are_annotated, seen_share = [], [], []
    for entry, shard, labels in labelled_shards(features):
        pairs = shard_pairs(entry, shard)
        logits, objects = shard["adapter_feat"].double() @ score.matrix.T, pairs.objects
        softmax = logits.masked_fill(~score.object_to_target[objects], float("-inf")).softmax(1).nan_to_num()
        used = torch.zeros(len(entry["images"]), dtype=torch.bool)
        used[image_of(entry, "annotations")[~torch.isin(shard["gt_hoi"], unseen)]] = True
        geometry.append(pair_geometry(pairs))
        are_annotated.append(labels.target.any(1))
        # 0 where the object has no verb: such a pair is not scored
        seen_share.append(used[image_of(entry, "rows")] * (softmax * seen[objects]).sum(1))
    x, annotated = torch.cat(geometry), torch.cat(are_annotated)
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    counts = torch.where(annotated, 1.0, torch.cat(seen_share))
    model = LogisticRegression(max_iter=1000)
    model.fit(((x - mean) / spread).numpy(), annotated.numpy(), counts.numpy())
    coefficient = torch.tensor([*model.coef_[0], *model.intercept_], dtype=torch.float64)
    return Artifact(
        NAME,
        {"weight": weight, "coefficients": dict(zip((*GEOMETRY, "constant"), coefficient.tolist(), strict=True))},
        {**score_files(features), TENSORS: {"mean": mean, "spread": spread, "coefficient": coefficient}},
    )

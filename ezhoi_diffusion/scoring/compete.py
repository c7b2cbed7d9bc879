"""`compete`: one verb against the others that the object allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch
from torch import Tensor

from ezhoi_diffusion.artifact import Artifact, ArtifactConfig
from ezhoi_diffusion.features.labels import PairLabels, labelled_shards
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.schema import LARGEST, TensorSpec
from ezhoi_diffusion.scoring.bridge import ScoreBridge, checked_number, load_artifact, score_files

if TYPE_CHECKING:
    from ezhoi_diffusion.features.batch import Pairs

NAME = "compete"
TENSORS = "compete.safetensors"
TABLE = {"exclusion": TensorSpec(torch.float64, "C C", 0, 1)}
GRID = {"alpha": (0.25, 0.5, 1.0)}


class CompeteConfig(ArtifactConfig):
    """config.json."""

    alpha: Annotated[float, msgspec.Meta(ge=0, le=LARGEST)]


class Compete(ScoreBridge):
    """z_v -> z_v + α·(z_v − log Σ_w e_vw·exp z_w), over the verbs w that the object allows.

    With all e_vw = 1 the term is α·log softmax: the idea of group softmax (Li et al., "Overcoming classifier imbalance
    for long-tail object detection with balanced group softmax", CVPR 2020). Here e_vw is how far v and w exclude each other.
    """

    needs_pairs = True
    settings = ("alpha",)
    grid = GRID
    exclusion: Tensor

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self.alpha = float(artifact.config["alpha"])
        self.register_buffer("exclusion", artifact.files[TENSORS]["exclusion"], persistent=False)  # [C, C]

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over an alpha of at least 0. Raises BridgeError for another value."""
        self.alpha = checked_number(NAME, settings, "alpha", self.alpha)

    def moved_logits(self, x: Tensor, logits: Tensor, pairs: Pairs | None) -> Tensor:
        """Add α·(z − log-sum over competitors) to logits [P, C] of allowed verbs."""
        assert pairs is not None
        allowed = self.allowed_verbs(pairs)
        return torch.where(allowed, logits + self.alpha * (logits - rivals(logits, allowed, self.exclusion)), logits)


def rivals(logits: Tensor, allowed: Tensor, exclusion: Tensor) -> Tensor:
    """log Σ_w e_vw·exp z_w [P, C] over allowed verbs w.

    Args:
        logits: z [P, C].
        allowed: [P, C] bool.
        exclusion: e [C, C], 1 on the diagonal.
    """
    masked = logits.masked_fill(~allowed, float("-inf"))
    top = masked.amax(1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)  # no allowed verb: any number will do
    total = ((masked - top).exp() @ exclusion.T).log() + top
    return torch.maximum(total, logits)  # e_vv = 1, so the sum is no less; it may underflow


def exclusion_of(blocks: Iterable[PairLabels]) -> Tensor:
    """e [C, C] in 0..1: 1 for verbs that exclude each other, 0 for verbs that come together as often as chance has it.

    e_vw = 1 − (n_vw + r) / (E_vw + 1), at least 0. Among annotated pairs in which both verbs count, n_vw have both, and E_vw =
    n_v·n_w / n would have both by chance. r = Σ n / Σ E stands for what is not known: verbs that were hardly compared, hidden
    ones among them, exclude each other as verbs of these labels do on the whole.
    """
    both, own, number = reduce(torch.add, map(_counts, blocks))
    expected = own * own.T / number.clamp_min(1)
    others = ~torch.eye(len(both), dtype=torch.bool)
    overall = both[others].sum() / expected[others].sum().clamp_min(1e-6)
    exclusion: Tensor = (1 - (both + overall) / (expected + 1)).clamp(0, 1).fill_diagonal_(1)
    return exclusion


def _counts(labels: PairLabels) -> Tensor:
    """[3, C, C]: n_vw, n_v and n among pairs in which v and w count."""
    annotated = labels.target.any(1)
    target, valid = (part[annotated].double() for part in (labels.target, labels.valid))
    return torch.stack([target.T @ target, target.T @ valid, valid.T @ valid])


def load(folder: Path | None) -> Compete:
    """Load the bridge in `folder`. Raises BridgeError."""
    return Compete(load_artifact(folder, NAME, {TENSORS: TABLE}, CompeteConfig))


def fit(features: FeatureStore, alpha: float = 0.5) -> Artifact:
    """Learn from annotated pairs of seen classes which verbs exclude each other.

    Args:
        features: A capture of the train split.
        alpha: Weight of the competition.
    """
    alpha = checked_number(NAME, {}, "alpha", alpha)
    tensors = {"exclusion": exclusion_of(labels for _, _, labels in labelled_shards(features))}
    return Artifact(NAME, {"alpha": alpha}, {**score_files(features), TENSORS: tensors})

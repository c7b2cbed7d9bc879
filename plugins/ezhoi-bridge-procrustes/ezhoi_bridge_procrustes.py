"""Linear maps from features to the texts of their own classes, learned from annotated pairs of seen classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion import (
    Artifact,
    Bridge,
    BridgeError,
    BridgePlugin,
    FeatureStore,
    ModalityStatistics,
    Pairs,
    SeenPairs,
    TensorSpec,
    seen_pairs,
)

NAME = "procrustes"
TENSORS = "procrustes.safetensors"
TABLE = {
    "visual_mean": TensorSpec(torch.float32, "D", -1, 1),
    "restored_mean": TensorSpec(torch.float32, "D", -1, 1),
    "weight": TensorSpec(torch.float32, "D D"),
}
PULL = 1e-6  # of |A||B|, towards the identity: it decides only where pairs say nothing
PENALTIES = [10.0**power for power in range(-5, 4)]  # of ridge, in units of the mean eigenvalue of AᵀA
BLOCK = 1024  # pairs at a time
CHOOSING_FRACTION = 0.2  # of the images: the tenth held out from every fit, and another tenth that chooses the penalty


class Procrustes(Bridge):
    """x [P, D] -> |x|·unit((1 − blend)·c + blend·c W + restored mean), with c = unit(x) − visual mean and W [D, D]."""

    row_by_row = True
    settings = ("blend",)
    grid: Mapping[str, Sequence[Any]] = {"blend": (0.1, 0.3, 0.6, 1.0)}
    visual_mean: Tensor
    restored_mean: Tensor
    weight: Tensor

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        for name in ("visual_mean", "restored_mean", "weight"):
            self.register_buffer(name, artifact.files[TENSORS][name])
        self.blend = checked_blend(artifact.config.get("blend"))
        self.provenance, self.context = artifact.provenance, artifact.context

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over a blend from 0 to 1. Raises BridgeError for another value."""
        self.blend = checked_blend(settings.get("blend", self.blend))

    @torch.no_grad()
    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Map features [P, D]."""
        x = adapter_feat.float()
        with torch.autocast(x.device.type, enabled=False):
            centred = normalize(x, dim=1) - self.visual_mean
            mapped = torch.lerp(centred, centred @ self.weight, self.blend) + self.restored_mean
            result = x.norm(dim=1, keepdim=True) * normalize(mapped, dim=1)
        return result.to(adapter_feat.dtype)


def checked_blend(blend: object) -> float:
    """A blend as a number. Raises BridgeError unless it is one from 0 to 1."""
    if isinstance(blend, bool) or not isinstance(blend, (int, float)) or not 0 <= blend <= 1:
        raise BridgeError(f"{NAME}: blend is a number from 0 (nothing changes) to 1, not {blend!r}")
    return float(blend)


def load(folder: Path | None) -> Procrustes:
    """Load the bridge in `folder`. Raises BridgeError."""
    if folder is None:
        raise BridgeError(
            f"{NAME} needs its folder: `ezhoi-diffusion train FEATURES --bridge {NAME} --out DIR` makes it"
        )
    return Procrustes(Artifact.load(folder, NAME, {TENSORS: TABLE}))


def fit(features: FeatureStore, mode: str = "orthogonal", blend: float = 1.0, mean: str = "visual") -> Artifact:
    """A linear map from centred unit features to the centred unit text of their class.

    It learns from annotated pairs of seen classes.

    Args:
        features: A capture of the train split.
        mode: `orthogonal` is the closest rotation (Schönemann, Psychometrika 1966). `ridge` is least squares with a
            penalty, chosen by the mean cosine of a tenth of the images' pairs to their texts.
        blend: 0 to 1, the share of the mapped feature in the result.
        mean: Which mean is given back, `visual` or `text`.

    Raises:
        BridgeError: An option has another value, or no image is left to choose the penalty by.
        EzhoiDiffusionError: The features have no labels to learn from.
    """
    if mode not in ("orthogonal", "ridge") or mean not in ("visual", "text"):
        raise BridgeError(f"{NAME}: mode is orthogonal or ridge, mean is visual or text, not {mode!r} and {mean!r}")
    config: dict[str, Any] = {"mode": mode, "blend": checked_blend(blend), "mean": mean}
    statistics = features.statistics()
    pairs = seen_pairs(features)
    if mode == "orthogonal":
        weight = rotation(Moments.of_pairs(pairs, statistics, torch.arange(len(pairs))))
    else:
        learned_from = torch.isin(pairs.image, seen_pairs(features, fraction=CHOOSING_FRACTION).image)
        if learned_from.all():
            raise BridgeError(
                f"{features.folder} has too few images: none with annotated pairs is left to choose the penalty by"
            )
        weight, facts = ridge(pairs, statistics, learned_from)
        config |= facts
    tensors = {
        "visual_mean": statistics.visual_mean,
        "restored_mean": statistics.text_mean if mean == "text" else statistics.visual_mean.clone(),
        "weight": weight.float(),
    }
    provenance = {"fingerprint": features.fingerprint, "pairs": len(pairs)}
    return Artifact(NAME, config, {TENSORS: tensors}, provenance)


@dataclass(frozen=True, eq=False)
class Moments:
    """What both maps need of a, b [M, D]: AᵀA and AᵀB [D, D], and the squares of |A| and |B|; all float64."""

    aa: Tensor
    ab: Tensor
    a: float
    b: float

    @classmethod
    def of_pairs(cls, pairs: SeenPairs, statistics: ModalityStatistics, rows: Tensor) -> Moments:
        """Sum over the pairs at `rows` [m] int64."""
        dim = pairs.visual.shape[1]
        aa, ab = torch.zeros(2, dim, dim, dtype=torch.float64)
        b = torch.zeros((), dtype=torch.float64)
        for visual, text in centred(pairs, statistics, rows):
            aa += visual.T @ visual
            ab += visual.T @ text
            b += text.square().sum()
        return cls(aa, ab, float(aa.trace()), float(b))


def centred(pairs: SeenPairs, statistics: ModalityStatistics, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks [n, D] float64: unit features and unit texts of the pairs at `rows`, less the mean of their side."""
    for block in rows.split(BLOCK):
        yield (
            normalize(pairs.visual[block].double(), dim=1) - statistics.visual_mean.double(),
            normalize(pairs.class_text[pairs.target[block]].double(), dim=1) - statistics.text_mean.double(),
        )


def rotation(of: Moments) -> Tensor:
    """R [D, D], orthogonal, with the least |a R − b|, and of those with the least |R − 1|.

    Texts of seen classes span fewer than D dimensions. In the others every rotation fits, and rounding would choose. A
    small multiple of the identity below both a and b [M, D] makes the rotation nearest to none win there.
    """
    from scipy.linalg import orthogonal_procrustes  # here: every command imports this module

    eye = torch.eye(len(of.ab), dtype=of.ab.dtype)
    pulled = of.ab + PULL * math.sqrt(of.a * of.b) * eye
    return torch.from_numpy(orthogonal_procrustes(pulled.T.numpy(), eye.numpy())[0])  # it takes AᵀB alone


def ridge(pairs: SeenPairs, statistics: ModalityStatistics, learned_from: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """W [D, D] of min |a W − b|² + alpha |W|² over all pairs; alpha, and the curve that chose it.

    A map learned from the pairs `learned_from` [M] bool has the largest mean cosine on the others at this alpha. One
    eigendecomposition of AᵀA serves every alpha.
    """
    learned, others = (chosen.nonzero().squeeze(1) for chosen in (learned_from, ~learned_from))
    known = Moments.of_pairs(pairs, statistics, learned)
    maps = dict(zip(PENALTIES, solved(known, PENALTIES), strict=True))
    total = dict.fromkeys(PENALTIES, 0.0)
    for visual, text in centred(pairs, statistics, others):
        for alpha, weight in maps.items():
            total[alpha] += float(torch.cosine_similarity(visual @ weight, text).sum())
    curve = {alpha: value / len(others) for alpha, value in total.items()}
    best = max(PENALTIES, key=lambda alpha: curve[alpha])
    rest = Moments.of_pairs(pairs, statistics, others)
    every = Moments(known.aa + rest.aa, known.ab + rest.ab, known.a + rest.a, known.b + rest.b)
    (weight,) = solved(every, [best])
    return weight, {"alpha": best, "curve": [{"alpha": alpha, "cosine": value} for alpha, value in curve.items()]}


def solved(of: Moments, penalties: Sequence[float]) -> Iterator[Tensor]:
    """(AᵀA + alpha·|A|²/D)⁻¹ AᵀB for each alpha."""
    values, axes = torch.linalg.eigh(of.aa)
    turned = axes.T @ of.ab
    for alpha in penalties:
        yield axes @ (turned / (values.clamp_min(0) + alpha * of.a / len(values)).unsqueeze(1))


plugin = BridgePlugin(NAME, load, fit)

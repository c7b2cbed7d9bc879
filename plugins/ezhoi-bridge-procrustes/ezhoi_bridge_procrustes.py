"""Linear maps from visual features to the texts of their own classes, learned from annotated pairs of seen classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion import BridgePlugin

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ezhoi_diffusion import Artifact, FeatureStore, ModalityStatistics, SeenPairs

TENSORS = "procrustes.safetensors"
PULL = 1e-6  # of |A||B|, to the identity: decides where pairs say nothing, and nothing else
ALPHAS = [10.0**power for power in range(-5, 4)]  # of ridge, in units of the mean eigenvalue of AᵀA
CHOOSING = 0.2  # of the images: the tenth that is held out from every fit, and another to choose alpha by


@dataclass(eq=False)
class Procrustes:
    """x [P, D] -> |x|·unit((1 − strength)·c + strength·c W + mean given back), c = unit(x) − visual mean.

    visual_mean, restored_mean: [D]. weight: W [D, D]. All float32. strength: 0 to 1.
    """

    visual_mean: Tensor
    restored_mean: Tensor
    weight: Tensor
    blend: float
    provenance: dict[str, Any]
    context: dict[str, Tensor]
    row_by_row = True
    settings = ("blend",)

    def __call__(self, adapter_feat: Tensor) -> Tensor:
        """Map rows, in their dtype and on their device."""
        import torch

        from ezhoi_diffusion import unit

        x = adapter_feat.float()
        visual_mean, restored, weight = (t.to(x.device) for t in (self.visual_mean, self.restored_mean, self.weight))
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            centred = unit(x) - visual_mean
            rows = torch.lerp(centred, centred @ weight, self.blend) + restored
            result: Tensor = (x.norm(dim=1, keepdim=True) * unit(rows)).to(adapter_feat.dtype)
        return result

    def sweep(self, points: Sequence[Mapping[str, Any]]) -> list[Procrustes]:
        """The same map with the strength of each point; the provenance says so. Raises BridgeError."""
        return [
            replace(self, blend=checked(point["blend"]), provenance={**self.provenance, "overridden": dict(point)})
            for point in points
        ]


def checked(blend: Any) -> float:
    """A strength as a number. Raises BridgeError unless it is one from 0 to 1."""
    from ezhoi_diffusion import BridgeError

    if not isinstance(blend, (int, float)) or not 0 <= blend <= 1:
        raise BridgeError(f"procrustes: strength is a number from 0 (nothing changes) to 1, not {blend!r}")
    return float(blend)


def load(folder: Path | None) -> Procrustes:
    """The bridge in `folder`. Raises BridgeError."""
    from ezhoi_diffusion import Artifact, BridgeError

    if folder is None:
        raise BridgeError(
            "procrustes is fitted first: `ezhoi-diffusion fit procrustes FEATURES --out DIR`, and then named as procrustes=DIR"
        )
    artifact = Artifact.load(folder, "procrustes")
    blend = checked(artifact.config["blend"])
    return Procrustes(**artifact.files[TENSORS], blend=blend, provenance=artifact.provenance, context=artifact.context)


def fit(features: FeatureStore, mode: str = "orthogonal", blend: float = 1.0, mean: str = "visual") -> Artifact:
    """A linear map from centred unit visual rows to the centred unit text of their class, on annotated pairs of seen classes.

    mode: `orthogonal`, of the rotations that come closest (Schönemann, Psychometrika 1966) that nearest to none; `ridge`, the
        linear map of least squares with a penalty, chosen by the mean cosine of a tenth of the images' pairs to their texts.
    strength: 0 to 1, how much of the mapped row is taken, and how little of the row itself.
    mean: which is given back, `visual` or `text`.
    Raises BridgeError for other values, SupervisionError for features without labels to learn from.
    """
    import torch

    from ezhoi_diffusion import Artifact, BridgeError, seen_pairs

    if mode not in ("orthogonal", "ridge") or mean not in ("visual", "text"):
        raise BridgeError(f"procrustes: mode is orthogonal or ridge, mean is visual or text, not {mode!r} and {mean!r}")
    config: dict[str, Any] = {"mode": mode, "blend": checked(blend), "mean": mean}
    statistics = features.statistics()
    pairs = seen_pairs(features)
    visual, text = centred(pairs, statistics)
    if mode == "orthogonal":
        weight = rotation(visual, text)
    else:
        learned_from = torch.isin(pairs.image, seen_pairs(features, fraction=CHOOSING).image)
        if learned_from.all():
            raise BridgeError(
                f"{features.folder} has too few images: none with annotated pairs is left to choose the penalty by"
            )
        weight, facts = ridge(visual, text, learned_from)
        config |= facts
    tensors = {
        "visual_mean": statistics.visual_mean,
        "restored_mean": statistics.text_mean if mean == "text" else statistics.visual_mean.clone(),
        "weight": weight.float(),
    }
    provenance = {"fingerprint": features.fingerprint, "pairs": len(visual)}
    return Artifact("procrustes", config, {TENSORS: tensors}, provenance)


def centred(pairs: SeenPairs, statistics: ModalityStatistics) -> tuple[Tensor, Tensor]:
    """[M, D] float64 each: unit visual rows and unit texts of their classes, less the mean of their side."""
    from ezhoi_diffusion import unit

    return (
        unit(pairs.visual.double()) - statistics.visual_mean.double(),
        unit(pairs.text.double()) - statistics.text_mean.double(),
    )


def rotation(a: Tensor, b: Tensor) -> Tensor:
    """R [D, D], orthogonal, with the least |a R − b|, and of those with the least |R − 1|.

    The texts of the seen classes span fewer than D dimensions. In the others every rotation would do, and rounding would
    choose: with a row of a small multiple of the identity for each dimension, on both sides, the one nearest to none is it.
    """
    import torch
    from scipy.linalg import orthogonal_procrustes

    pull = (PULL * a.norm() * b.norm()).sqrt() * torch.eye(a.shape[1], dtype=a.dtype)
    return torch.from_numpy(orthogonal_procrustes(torch.cat([a, pull]).numpy(), torch.cat([b, pull]).numpy())[0])


def ridge(a: Tensor, b: Tensor, learned_from: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """W [D, D] of min |a W − b|² + alpha |W|² over all rows of a, b [M, D]; alpha, and the curve that it was chosen by.

    The alpha is that for which a map learned from some rows, [M] bool, has the largest mean cosine on the others.
    """
    import torch
    from sklearn.linear_model import Ridge

    def fitted(rows: Tensor, alpha: float) -> Tensor:
        penalty = alpha * float(a[rows].square().sum() / a.shape[1])
        model = Ridge(alpha=penalty, fit_intercept=False, solver="cholesky").fit(a[rows].numpy(), b[rows].numpy())
        return torch.from_numpy(model.coef_.T.copy())

    def cosine(alpha: float) -> float:
        mapped = a[~learned_from] @ fitted(learned_from, alpha)
        return float(torch.cosine_similarity(mapped, b[~learned_from]).mean())

    curve = {alpha: cosine(alpha) for alpha in ALPHAS}
    best = max(ALPHAS, key=lambda alpha: curve[alpha])
    weight = fitted(torch.ones_like(learned_from), best)
    return weight, {"alpha": best, "curve": [{"alpha": alpha, "cosine": value} for alpha, value in curve.items()]}


plugin = BridgePlugin("procrustes", load, fit)

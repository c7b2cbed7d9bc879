"""Standardisation as a bridge: visual features get the spread of the texts, by dimension or as a whole (CORAL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion import BridgePlugin

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

    from ezhoi_diffusion import Artifact, FeatureStore

TENSORS = "standardize.safetensors"
SHRINKAGE = {"diagonal": 0.0, "coral": 0.1}  # where none is asked for
VARIED = 1e-9  # of the largest variance: what is below is rounding, and has no inverse


@dataclass(eq=False)
class Standardize:
    """x [P, D] -> |x|·unit((unit(x) − visual mean) A + mean given back).

    visual_mean, restored_mean: [D]. spread: A, [D, D], or its diagonal [D]. All float32.
    """

    visual_mean: Tensor
    restored_mean: Tensor
    spread: Tensor
    provenance: dict[str, Any]
    context: dict[str, Tensor]
    row_by_row = True
    control = True

    def __call__(self, adapter_feat: Tensor) -> Tensor:
        """Spread rows, in their dtype and on their device."""
        import torch

        from ezhoi_diffusion import unit

        x = adapter_feat.float()
        visual_mean, restored, spread = (t.to(x.device) for t in (self.visual_mean, self.restored_mean, self.spread))
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            centred = unit(x) - visual_mean
            rows = (centred @ spread if spread.ndim == 2 else centred * spread) + restored
            result: Tensor = (x.norm(dim=1, keepdim=True) * unit(rows)).to(adapter_feat.dtype)
        return result


def load(folder: Path | None) -> Standardize:
    """The bridge in `folder`. Raises BridgeError."""
    from ezhoi_diffusion import Artifact, BridgeError

    if folder is None:
        raise BridgeError(
            "standardize is fitted first: `ezhoi-diffusion fit standardize FEATURES --out DIR`, and then named as "
            "standardize=DIR"
        )
    artifact = Artifact.load(folder, "standardize")
    return Standardize(**artifact.files[TENSORS], provenance=artifact.provenance, context=artifact.context)


def fit(
    features: FeatureStore, mode: str = "diagonal", shrinkage: float | None = None, mean: str = "visual"
) -> Artifact:
    """Unit visual rows less their mean get the spread of the unit text rows, a mean is given back, and each row its norm.

    mode: `diagonal`, each dimension the texts' standard deviation; `coral`, the texts' whole covariance.
    shrinkage: 0 to 1, how far both covariances are drawn to a multiple of the identity (0 for diagonal, 0.1 for coral).
    mean: which is given back, `visual` or `text`.
    It reads no labels. Raises BridgeError for other values, and for features that were imported without their texts.
    """
    import torch

    from ezhoi_diffusion import Artifact, BridgeError

    if mode not in ("diagonal", "coral") or mean not in ("visual", "text"):
        raise BridgeError(f"standardize: mode is diagonal or coral, mean is visual or text, not {mode!r} and {mean!r}")
    shrinkage = SHRINKAGE[mode] if shrinkage is None else shrinkage
    if not isinstance(shrinkage, (int, float)) or not 0 <= shrinkage <= 1:
        raise BridgeError(f"standardize: shrinkage is a number from 0 to 1, not {shrinkage!r}")
    if len(features.text) == 0:
        raise BridgeError(
            f"{features.folder} was imported without its texts, whose spread is needed: capture the features"
        )
    statistics = features.statistics()
    visual = covariance((shard["adapter_feat"] for shard in features.shards()), statistics.visual_mean)
    text = covariance([features.text], statistics.text_mean)
    if mode == "diagonal":
        visual, text = visual.diagonal(), text.diagonal()
        spread = root(shrunk(visual, shrinkage), inverse=True) * root(shrunk(text, shrinkage))
    else:
        eye = torch.eye(len(text), dtype=text.dtype)
        (v, whiten), (t, recolour) = (torch.linalg.eigh(shrunk(matrix, shrinkage, eye)) for matrix in (visual, text))
        spread = (whiten * root(v, inverse=True)) @ whiten.T @ (recolour * root(t)) @ recolour.T
    tensors = {
        "visual_mean": statistics.visual_mean,
        "restored_mean": statistics.text_mean if mean == "text" else statistics.visual_mean.clone(),
        "spread": spread.float(),
    }
    config = {"mode": mode, "shrinkage": shrinkage, "mean": mean}
    return Artifact("standardize", config, {TENSORS: tensors}, {"fingerprint": features.fingerprint})


def covariance(blocks: Iterable[Tensor], mean: Tensor) -> Tensor:
    """[D, D] float64 of the unit rows of blocks [n, D] around their mean [D], divided by their number."""
    import torch

    from ezhoi_diffusion import unit

    total, count = torch.zeros(len(mean), len(mean), dtype=torch.float64), 0
    for block in blocks:
        centred = unit(block.double()) - mean.double()
        total += centred.T @ centred
        count += len(block)
    return total / count


def shrunk(covariance: Tensor, shrinkage: float, eye: Tensor | float = 1.0) -> Tensor:
    """A covariance [D, D], or variances [D], and as much of the mean variance: the form of Ledoit and Wolf (2004)."""
    variances = covariance.diagonal() if covariance.ndim == 2 else covariance
    return (1 - shrinkage) * covariance + shrinkage * variances.mean() * eye


def root(variances: Tensor, *, inverse: bool = False) -> Tensor:
    """Their square roots, or one over those; 0 where there is no variance: nothing is known of it."""
    varied = variances > VARIED * variances.max()
    return variances.clamp_min(0).pow(-0.5 if inverse else 0.5).where(varied, 0.0)


plugin = BridgePlugin("standardize", load, fit)

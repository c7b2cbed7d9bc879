"""Standardisation as a baseline: features get the spread of the texts, by dimension or as a whole (CORAL)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion import Artifact, Bridge, BridgeError, BridgePlugin, FeatureStore, Pairs, TensorSpec

NAME = "standardize"
TENSORS = "standardize.safetensors"
MEANS = {name: TensorSpec(torch.float32, "D", -1, 1) for name in ("visual_mean", "restored_mean")}
DEFAULT_SHRINKAGE = {"diagonal": 0.0, "coral": 0.1}
BLOCK = 1024  # features at a time
MIN_VARIANCE = 1e-9  # of the largest: below it a variance is rounding and has no inverse


class Standardize(Bridge):
    """x [P, D] -> |x|·unit((unit(x) − visual mean) A + restored mean), with A [D, D], or its diagonal [D]."""

    row_by_row = True
    baseline = True
    visual_mean: Tensor
    restored_mean: Tensor
    spread: Tensor

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        for name in ("visual_mean", "restored_mean", "spread"):
            self.register_buffer(name, artifact.files[TENSORS][name])
        self.provenance, self.context = artifact.provenance, artifact.context

    @torch.no_grad()
    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Spread features [P, D]."""
        x = adapter_feat.float()
        with torch.autocast(x.device.type, enabled=False):
            centred = normalize(x, dim=1) - self.visual_mean
            spread = centred @ self.spread if self.spread.ndim == 2 else centred * self.spread
            result = x.norm(dim=1, keepdim=True) * normalize(spread + self.restored_mean, dim=1)
        return result.to(adapter_feat.dtype)


def load(folder: Path | None) -> Standardize:
    """Load the bridge in `folder`. Raises BridgeError."""
    if folder is None:
        raise BridgeError(
            f"{NAME} needs its folder: `ezhoi-diffusion train FEATURES --bridge {NAME} --out DIR` makes it"
        )
    spread = "D D" if Artifact.load(folder, NAME).config.get("mode") == "coral" else "D"
    table = {**MEANS, "spread": TensorSpec(torch.float32, spread, -1e6, 1e6)}
    return Standardize(Artifact.load(folder, NAME, {TENSORS: table}))


def fit(
    features: FeatureStore, mode: str = "diagonal", shrinkage: float | None = None, mean: str = "visual"
) -> Artifact:
    """Unit features, less their mean, get the spread of the unit texts. A mean and each norm are given back.

    It reads no labels.

    Args:
        features: A capture of the train split.
        mode: `diagonal` gives each dimension the texts' standard deviation, `coral` the texts' whole covariance.
        shrinkage: 0 to 1, how far both covariances shrink to a multiple of the identity (diagonal 0, coral 0.1).
        mean: Which mean is given back, `visual` or `text`.

    Raises:
        BridgeError: An option has another value, or the features were imported without their texts.
    """
    if mode not in ("diagonal", "coral") or mean not in ("visual", "text"):
        raise BridgeError(f"{NAME}: mode is diagonal or coral, mean is visual or text, not {mode!r} and {mean!r}")
    shrinkage = DEFAULT_SHRINKAGE[mode] if shrinkage is None else shrinkage
    if not isinstance(shrinkage, (int, float)) or not 0 <= shrinkage <= 1:
        raise BridgeError(f"{NAME}: shrinkage is a number from 0 to 1, not {shrinkage!r}")
    if len(features.text) == 0:
        raise BridgeError(f"{features.folder} was imported without its texts, which {NAME} needs: capture the features")
    statistics = features.statistics()
    blocks = (block for shard in features.shards() for block in shard["adapter_feat"].split(BLOCK))
    visual, text = (
        covariance(some, mean, diagonal=mode == "diagonal")
        for some, mean in ((blocks, statistics.visual_mean), ([features.text], statistics.text_mean))
    )
    if mode == "diagonal":
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
    return Artifact(NAME, config, {TENSORS: tensors}, {"fingerprint": features.fingerprint})


def covariance(blocks: Iterable[Tensor], mean: Tensor, *, diagonal: bool = False) -> Tensor:
    """[D, D] float64, of the unit rows of blocks [n, D] around their mean [D], divided by their number; or its diagonal [D]."""
    total = torch.zeros(len(mean), dtype=torch.float64) if diagonal else torch.zeros(len(mean), len(mean)).double()
    count = 0
    for block in blocks:
        centred = normalize(block.double(), dim=1) - mean.double()
        total += centred.square().sum(0) if diagonal else centred.T @ centred
        count += len(block)
    return total / count


def shrunk(covariance: Tensor, shrinkage: float, eye: Tensor | float = 1.0) -> Tensor:
    """Shrink a covariance [D, D], or variances [D], to the mean variance: the form of Ledoit and Wolf (2004)."""
    variances = covariance.diagonal() if covariance.ndim == 2 else covariance
    return (1 - shrinkage) * covariance + shrinkage * variances.mean() * eye


def root(variances: Tensor, *, inverse: bool = False) -> Tensor:
    """Square roots of variances [D], or one over them; 0 where there is no variance, because nothing is known of it."""
    varied = variances > MIN_VARIANCE * variances.max()
    return variances.clamp_min(0).pow(-0.5 if inverse else 0.5).where(varied, 0.0)


plugin = BridgePlugin(NAME, load, fit)

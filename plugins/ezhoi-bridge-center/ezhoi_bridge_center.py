"""Own-mean centring as a baseline: features lose what all features share, and the texts what all texts share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ezhoi_diffusion import Artifact, Bridge, BridgeError, BridgePlugin, FeatureStore, Pairs, TensorSpec

NAME = "center"
TENSORS = "center.safetensors"
TABLE = {name: TensorSpec(torch.float32, "D") for name in ("visual_mean", "text_mean", "w")}
TOLERANCE = 1e-4  # how far from 1 the product of a text with w may be


class Center(Bridge):
    """x [P, D] -> c − (c·text mean) w, where c = |x|·(unit(x) − visual mean) and T w = 1.

    EZ-HOI multiplies with its texts as they are. For each text t, (c − (c·m) w)·t = c·t − c·m = c·(t − m).
    """

    row_by_row = True
    baseline = True
    visual_mean: Tensor
    text_mean: Tensor
    w: Tensor

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        for name in ("visual_mean", "text_mean", "w"):
            self.register_buffer(name, artifact.files[TENSORS][name])
        self.provenance, self.context = artifact.provenance, artifact.context

    @torch.no_grad()
    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Centre features [P, D]."""
        x = adapter_feat.float()
        with torch.autocast(x.device.type, enabled=False):
            centred = x - x.norm(dim=1, keepdim=True) * self.visual_mean
            result = centred - (centred @ self.text_mean).unsqueeze(1) * self.w
        return result.to(adapter_feat.dtype)


def load(folder: Path | None) -> Center:
    """Load the bridge in `folder`. Raises BridgeError."""
    if folder is None:
        raise BridgeError(
            f"{NAME} needs its folder: `ezhoi-diffusion train FEATURES --bridge {NAME} --out DIR` makes it"
        )
    return Center(Artifact.load(folder, NAME, {TENSORS: TABLE}))


def fit(features: FeatureStore) -> Artifact:
    """Both sides lose their own mean: features that of the unit features, texts that of the texts.

    It has no options and reads no labels.

    Raises:
        BridgeError: No vector has a product of 1 with every text, which can happen with more texts than dimensions.
    """
    text = features.text.double()
    if len(text) == 0:
        raise BridgeError(f"{features.folder} was imported without its texts, which {NAME} needs: capture the features")
    w = torch.linalg.lstsq(text, torch.ones(len(text), 1, dtype=text.dtype), driver="gelsd").solution[:, 0].float()
    residual = float((text @ w.double() - 1).abs().max())
    if not residual <= TOLERANCE:
        raise BridgeError(
            f"{features.folder}: {len(text)} texts of width {text.shape[1]} cannot be centred through the features; the best "
            f"vector misses a product of 1 by {residual:.3g}. Use ezhoi-bridge-standardize, which needs no such vector"
        )
    tensors = {"visual_mean": features.statistics().visual_mean, "text_mean": text.mean(0).float(), "w": w}
    config = {"residual": residual, "norm_of_w": float(w.norm())}
    return Artifact(NAME, config, {TENSORS: tensors}, {"fingerprint": features.fingerprint})


plugin = BridgePlugin(NAME, load, fit)

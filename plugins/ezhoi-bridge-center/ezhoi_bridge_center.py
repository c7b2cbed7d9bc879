"""Own-mean centring as a bridge: what all visual features share is taken off them, what all texts share off the texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion import BridgePlugin

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ezhoi_diffusion import Artifact, FeatureStore

TENSORS = "center.safetensors"
TOLERANCE = 1e-4  # of 1, by which a text's product with w may be off


@dataclass(eq=False)
class Center:
    """x [P, D] -> c − (c·text mean) w, where c = |x|·(unit(x) − visual mean) and T w = 1.

    The host multiplies with its texts as they are, and (c − (c·m) w)·t = c·t − c·m = c·(t − m) for each of its texts t. All
    vectors [D] float32.
    """

    visual_mean: Tensor
    text_mean: Tensor
    w: Tensor
    provenance: dict[str, Any]
    context: dict[str, Tensor]
    row_by_row = True
    control = True

    def __call__(self, adapter_feat: Tensor) -> Tensor:
        """Centre rows, in their dtype and on their device."""
        import torch

        x = adapter_feat.float()
        visual_mean, text_mean, w = (vector.to(x.device) for vector in (self.visual_mean, self.text_mean, self.w))
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            centred = x - x.norm(dim=1, keepdim=True) * visual_mean
            result: Tensor = (centred - (centred @ text_mean).unsqueeze(1) * w).to(adapter_feat.dtype)
        return result


def load(folder: Path | None) -> Center:
    """The bridge in `folder`. Raises BridgeError."""
    from ezhoi_diffusion import Artifact, BridgeError

    if folder is None:
        raise BridgeError(
            "center is fitted first: `ezhoi-diffusion fit center FEATURES --out DIR`, and then named as center=DIR"
        )
    artifact = Artifact.load(folder, "center")
    return Center(**artifact.files[TENSORS], provenance=artifact.provenance, context=artifact.context)


def fit(features: FeatureStore) -> Artifact:
    """Both sides lose their own mean: the visual rows that of the unit rows, the texts that of the texts.

    It has no options, and reads no labels. Raises BridgeError where no vector has a product of 1 with every text, as
    there need not be one where the texts are more than D.
    """
    import torch

    from ezhoi_diffusion import Artifact, BridgeError

    text = features.text.double()
    if len(text) == 0:
        raise BridgeError(
            f"{features.folder} was imported without its texts, which centring needs: capture the features"
        )
    w = torch.linalg.lstsq(text, torch.ones(len(text), 1, dtype=text.dtype), driver="gelsd").solution[:, 0].float()
    residual = float((text @ w.double() - 1).abs().max())
    if not residual <= TOLERANCE:
        raise BridgeError(
            f"{features.folder}: the {len(text)} texts of width {text.shape[1]} cannot be centred by changing the visual side "
            f"alone: a vector whose product with each is 1 misses one by {residual:.3g}. Take ezhoi-bridge-standardize, which "
            f"needs no such vector"
        )
    tensors = {"visual_mean": features.statistics().visual_mean, "text_mean": text.mean(0).float(), "w": w}
    config = {"residual": residual, "norm_of_w": float(w.norm())}
    return Artifact("center", config, {TENSORS: tensors}, {"fingerprint": features.fingerprint})


plugin = BridgePlugin("center", load, fit)

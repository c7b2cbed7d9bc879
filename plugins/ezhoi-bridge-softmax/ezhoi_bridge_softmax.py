"""The control that is no bridge: calibrates each pair's scores over the classes, and moves no feature towards a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion import BridgePlugin

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ezhoi_diffusion import Artifact, FeatureStore

TENSORS = "softmax.safetensors"
TOLERANCE = 1e-3  # of a probability: a control that misses by more says nothing


@dataclass(eq=False)
class Softmax:
    """x [P, D] -> x + (logit(softmax(temperature · x M)) − x M) M⁺, whose logits are those of the softmax.

    matrix: M [D, C], with x M the host's logits of rows x. inverse: M⁺ [C, D]. Both float64, as is what is computed with them.
    """

    matrix: Tensor
    inverse: Tensor
    temperature: float
    provenance: dict[str, Any]
    context: dict[str, Tensor]
    row_by_row = True
    control = True

    def __call__(self, adapter_feat: Tensor) -> Tensor:
        """Calibrate rows, in their dtype and on their device."""
        import torch

        x = adapter_feat.double()
        matrix, inverse = self.matrix.to(x.device), self.inverse.to(x.device)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            logits = x @ matrix
            moved = x + (logit_of_softmax(self.temperature * logits) - logits) @ inverse
            result: Tensor = torch.where(x.any(1, keepdim=True), moved, x).to(adapter_feat.dtype)
        return result


def logit_of_softmax(z: Tensor) -> Tensor:
    """log p − log(1 − p) [P, C] of p = softmax(z), finite for all finite z [P, C] of two classes and more."""
    top = z.argmax(1, keepdim=True)
    log_p = z.log_softmax(1)
    # 1 − p of the largest p may round to zero: it is the sum of the others
    others = z.scatter(1, top, float("-inf")).logsumexp(1, keepdim=True) - z.logsumexp(1, keepdim=True)
    return log_p - (-log_p.exp()).log1p().scatter(1, top, others)


def load(folder: Path | None) -> Softmax:
    """The control in `folder`. Raises BridgeError."""
    from ezhoi_diffusion import Artifact, BridgeError

    if folder is None:
        raise BridgeError(
            "softmax is fitted first: `ezhoi-diffusion fit softmax FEATURES --out DIR`, and then named as softmax=DIR"
        )
    artifact = Artifact.load(folder, "softmax")
    temperature = float(artifact.config["temperature"])
    return Softmax(
        **artifact.files[TENSORS], temperature=temperature, provenance=artifact.provenance, context=artifact.context
    )


def fit(features: FeatureStore) -> Artifact:
    """One temperature for all classes, by the likelihood of annotated pairs of seen classes in training images.

    It has no options. Raises SupervisionError for features without labels to learn from, ScoreError where the host's score is
    not known, BridgeError where its logits cannot be set one by one, as with fewer dimensions than classes.
    """
    import math

    import torch
    from scipy.optimize import minimize_scalar

    from ezhoi_diffusion import Artifact, BridgeError, Score, seen_pairs

    score, pairs = Score.of(features), seen_pairs(features)
    matrix = score.logits(torch.eye(pairs.visual.shape[1])).double()  # the score is linear
    logits = pairs.visual.double() @ matrix

    def loss(log_temperature: float) -> float:
        z = math.exp(log_temperature) * logits
        return float(torch.nn.functional.cross_entropy(z, pairs.target))

    found = minimize_scalar(loss, bounds=(-7, 7), method="bounded", options={"xatol": 1e-6})
    temperature = math.exp(found.x)
    provenance = {"fingerprint": features.fingerprint, "pairs": len(pairs)}
    tensors = {"matrix": matrix, "inverse": torch.linalg.pinv(matrix)}
    control = Softmax(**tensors, temperature=temperature, provenance=provenance, context={})
    probability = (temperature * logits).softmax(1)
    error = float((score.logits(control(pairs.visual)).sigmoid() - probability).abs().max())
    if not error <= TOLERANCE:
        raise BridgeError(
            f"{features.folder}: with {matrix.shape[0]} dimensions the host's {matrix.shape[1]} logits cannot be set one by one "
            f"(a probability is missed by {error:.3g}), so its scores cannot be calibrated through the features"
        )
    config = {
        "temperature": temperature,
        "negative_log_likelihood": {"as it is": loss(0.0), "keep_norm": float(found.fun)},
        "largest_error": error,
    }
    return Artifact("softmax", config, {TENSORS: tensors}, provenance)


plugin = BridgePlugin("softmax", load, fit)

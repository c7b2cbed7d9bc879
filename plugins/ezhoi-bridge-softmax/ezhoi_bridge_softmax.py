"""Calibration as a baseline: each pair's scores become a softmax over the classes, and no feature nears a text."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ezhoi_diffusion import (
    Artifact,
    Bridge,
    BridgeError,
    BridgePlugin,
    EzHoiScore,
    FeatureStore,
    Pairs,
    TensorSpec,
    seen_pairs,
)

NAME = "softmax"
TENSORS = "softmax.safetensors"
TABLE = {"matrix": TensorSpec(torch.float64, "D C"), "inverse": TensorSpec(torch.float64, "C D")}
MAX_TEMPERATURE = 2000.0  # the fit looks up to e^7
BLOCK = 1024  # pairs at a time
TOLERANCE = 1e-3  # of a probability: a baseline that misses by more says nothing


class Softmax(Bridge):
    """x [P, D] -> x + (logit(softmax(temperature · x M)) − x M) M⁺, whose logits are those of the softmax.

    M [D, C] gives EZ-HOI's logits x M, M⁺ [C, D] is its pseudo-inverse. Both are float64, as is what they compute.
    """

    row_by_row = True
    baseline = True
    matrix: Tensor
    inverse: Tensor

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        for name in ("matrix", "inverse"):
            self.register_buffer(name, artifact.files[TENSORS][name])
        temperature = artifact.config.get("temperature")
        if not isinstance(temperature, float) or not 0 < temperature < MAX_TEMPERATURE:
            raise BridgeError(
                f"{NAME}: temperature is a number from 0 to {MAX_TEMPERATURE}, not {temperature!r:.60}: fit it again"
            )
        self.temperature = temperature
        self.provenance, self.context = artifact.provenance, artifact.context

    @torch.no_grad()
    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        """Calibrate features [P, D]."""
        x = adapter_feat.double()
        with torch.autocast(x.device.type, enabled=False):
            logits = x @ self.matrix
            moved = x + (logit_of_softmax(self.temperature * logits) - logits) @ self.inverse
            result = torch.where(x.any(1, keepdim=True), moved, x)
        return result.to(adapter_feat.dtype)


def logit_of_softmax(z: Tensor) -> Tensor:
    """log p − log(1 − p) [P, C] of p = softmax(z), finite for all finite z [P, C] of two classes and more."""
    top = z.argmax(1, keepdim=True)
    log_p = z.log_softmax(1)
    # 1 − p of the largest p may round to zero, so it is computed as the sum of the others.
    others = z.scatter(1, top, float("-inf")).logsumexp(1, keepdim=True) - z.logsumexp(1, keepdim=True)
    return log_p - (-log_p.exp()).log1p().scatter(1, top, others)


def load(folder: Path | None) -> Softmax:
    """Load the bridge in `folder`. Raises BridgeError."""
    if folder is None:
        raise BridgeError(
            f"{NAME} needs its folder: `ezhoi-diffusion train FEATURES --bridge {NAME} --out DIR` makes it"
        )
    return Softmax(Artifact.load(folder, NAME, {TENSORS: TABLE}))


def fit(features: FeatureStore) -> Artifact:
    """One temperature for all classes, by the likelihood of annotated pairs of seen classes in training images.

    It has no options.

    Raises:
        EzhoiDiffusionError: The features have no labels to learn from, or no score of EZ-HOI.
        BridgeError: The logits cannot be set one by one, as with fewer dimensions than classes.
    """
    from scipy.optimize import minimize_scalar  # here: every command imports this module

    features.require_all_texts(f"{NAME} is fitted with")
    score, pairs = EzHoiScore.from_store(features), seen_pairs(features)
    visual, target = pairs.visual, pairs.target
    del pairs  # with texts, which are as large as the features
    matrix = score.logits(torch.eye(visual.shape[1])).double()  # the score is linear
    logits = torch.cat([block.double() @ matrix for block in visual.split(BLOCK)])

    def loss(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(math.exp(log_temperature) * logits, target))

    found = minimize_scalar(loss, bounds=(-7, 7), method="bounded", options={"xatol": 1e-6})
    temperature = math.exp(found.x)
    config = {
        "temperature": temperature,
        "negative_log_likelihood": {"before": loss(0.0), "after": float(found.fun)},
    }
    tensors = {"matrix": matrix, "inverse": torch.linalg.pinv(matrix)}
    bridge = Softmax(Artifact(NAME, config, {TENSORS: tensors}))
    error = max(
        float((score.logits(bridge(block)).sigmoid() - (temperature * wanted).softmax(1)).abs().max())
        for block, wanted in zip(visual.split(BLOCK), logits.split(BLOCK), strict=True)
    )
    if not error <= TOLERANCE:
        raise BridgeError(
            f"{features.folder}: {matrix.shape[0]} dimensions cannot carry {matrix.shape[1]} logits one by one (a probability "
            f"is missed by {error:.3g}), so scores cannot be calibrated through these features"
        )
    provenance = {"fingerprint": features.fingerprint, "pairs": len(target)}
    return Artifact(NAME, {**config, "largest_error": error}, {TENSORS: tensors}, provenance)


plugin = BridgePlugin(NAME, load, fit)

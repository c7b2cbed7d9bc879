"""Flow matching as a bridge: features flow to the texts of their own classes, along what annotated pairs showed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ezhoi_diffusion import BridgePlugin

if TYPE_CHECKING:
    from pathlib import Path

    from ezhoi_bridge_flow.bridge import Flow
    from ezhoi_diffusion import Artifact, FeatureStore


def load(folder: Path | None) -> Flow:
    """The bridge in `folder`. Raises BridgeError."""
    from ezhoi_bridge_flow.bridge import Flow
    from ezhoi_diffusion import Artifact, BridgeError

    if folder is None:
        raise BridgeError(
            "flow is fitted first: `ezhoi-diffusion fit flow FEATURES --out DIR`, and then named as flow=DIR"
        )
    return Flow.of(Artifact.load(folder, "flow"))


def fit(
    features: FeatureStore,
    train_steps: int = 1000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    noise: float = 0.2,
    patience: int = 5,
    seed: int = 0,
    width: int = 512,
    blocks: int = 2,
    steps: int = 4,
    blend: float = 1.0,
    mean: str = "visual",
) -> Artifact:
    """A velocity that takes centred unit visual rows to the centred unit text of their class, learned from annotated pairs.

    train_steps: optimiser steps at most; every 50 the pairs of a tenth of the images, which are not learned from, are
        bridged, and the weights with the largest mean cosine to their texts are kept.
    patience: evaluations without a better one, after which training ends.
    batch_size, learning_rate: of AdamW.
    noise: standard deviation of the noise on the start of each path, against 1 for a row's own components.
    seed: another seed is another bridge.
    width, blocks: of the residual network.
    steps: of the midpoint rule at application, two network evaluations each.
    strength: 0 to 1, how much of where a row flows is taken, and how little of the row itself.
    mean: which is given back, `visual` or `text`.
    Raises BridgeError for values out of range, SupervisionError for features without labels to learn from.
    """
    from ezhoi_bridge_flow.bridge import Options
    from ezhoi_bridge_flow.training import Training, train

    training = Training(train_steps, batch_size, learning_rate, noise, patience, seed)
    return train(features, Options(width, blocks, steps, blend, mean), training)


plugin = BridgePlugin("flow", load, fit)

"""Flow matching as a bridge: features flow to the texts of their own classes, as annotated pairs show.

What needs flow_matching is imported where it is used, so that finding the plugin stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ezhoi_diffusion import BridgePlugin

if TYPE_CHECKING:
    from pathlib import Path

    from ezhoi_bridge_flow.bridge import Flow
    from ezhoi_diffusion import Artifact, FeatureStore


def load(folder: Path | None) -> Flow:
    """Load the bridge in `folder`. Raises BridgeError."""
    from ezhoi_bridge_flow.bridge import MEANS, MODEL, TABLE, Flow
    from ezhoi_diffusion import Artifact, BridgeError

    if folder is None:
        raise BridgeError("flow needs its folder: `ezhoi-diffusion train FEATURES --bridge flow --out DIR` makes it")
    return Flow.from_artifact(Artifact.load(folder, "flow", {MODEL: None, MEANS: TABLE}))


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
    num_steps: int = 4,
    blend: float = 1.0,
    mean: str = "visual",
) -> Artifact:
    """A velocity that takes centred unit features to the centred unit text of their class.

    It learns from annotated pairs of seen classes, by flow matching.

    Args:
        features: A capture of the train split.
        train_steps: Optimizer steps at most. Every 50 steps the pairs of a tenth of the images, which are not learned
            from, are bridged; the weights with the largest mean cosine to their texts are kept.
        batch_size: Of AdamW.
        learning_rate: Of AdamW.
        noise: Standard deviation of the noise on the start of each path; a feature's own components have 1.
        patience: Evaluations without a better one, after which training ends.
        seed: Another seed gives another bridge.
        width: Of the residual network.
        blocks: Of the residual network.
        num_steps: Of the midpoint rule at application; each takes two network evaluations.
        blend: 0 to 1, the share of the bridged feature in the result.
        mean: Which mean is given back, `visual` or `text`.

    Raises:
        BridgeError: An option is out of range.
        EzhoiDiffusionError: The features have no labels to learn from.
    """
    from ezhoi_bridge_flow.bridge import Options
    from ezhoi_bridge_flow.training import Training, train

    training = Training(train_steps, batch_size, learning_rate, noise, patience, seed)
    return train(features, Options(width, blocks, num_steps, blend, mean), training)


plugin = BridgePlugin("flow", load, fit)

"""The baseline that closes the modality gap without a network: it exchanges the visual mean for the text mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ezhoi_diffusion.builtin.bridge_plugin import BridgePlugin
from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from ezhoi_diffusion.artifact import Artifact
    from ezhoi_diffusion.diffusion.baselines import MeanShift
    from ezhoi_diffusion.features.store import FeatureStore


def load(folder: Path | None) -> MeanShift:
    """Load the means in `folder`, of a fit or of a diffusion bridge. Raises BridgeError, or EzhoiDiffusionError without a folder."""
    from ezhoi_diffusion.diffusion.baselines import MeanShift

    if folder is None:
        raise EzhoiDiffusionError(
            "mean_shift takes its means from a trained bridge: give mean_shift=DIR, or --bridge DIR"
        )
    return MeanShift.from_pretrained(folder)


def fit(features: FeatureStore) -> Artifact:
    """The means of pair features and texts. It has no options and reads no labels."""
    from ezhoi_diffusion.diffusion.baselines import fit_mean_shift

    return fit_mean_shift(features)


plugin = BridgePlugin("mean_shift", load, fit)

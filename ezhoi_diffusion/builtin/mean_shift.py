"""The baseline that closes the modality gap without a network: it exchanges the visual mean for the text mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ezhoi_diffusion.builtin.bridge_plugin import BridgePlugin
from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from ezhoi_diffusion.diffusion.baselines import MeanShift


def load(folder: Path | None) -> MeanShift:
    """Load the means of the diffusion bridge in `folder`. Raises BridgeError, or EzhoiDiffusionError without a folder."""
    from ezhoi_diffusion.diffusion.baselines import MeanShift

    if folder is None:
        raise EzhoiDiffusionError(
            "mean_shift takes its means from a trained bridge: give mean_shift=DIR, or --bridge DIR"
        )
    return MeanShift.from_pretrained(folder)


plugin = BridgePlugin("mean_shift", load)

"""The baseline that changes nothing: a comparison in which it differs from `none` is broken."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ezhoi_diffusion.builtin.bridge_plugin import BridgePlugin

if TYPE_CHECKING:
    from ezhoi_diffusion.diffusion.baselines import Identity


def load(folder: Path | None) -> Identity:
    """The identity, whatever the folder."""
    from ezhoi_diffusion.diffusion.baselines import Identity

    return Identity()


plugin = BridgePlugin("identity", load)

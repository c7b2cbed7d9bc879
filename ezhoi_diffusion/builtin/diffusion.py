"""`--plugin diffusion --bridge DIR`: replaces adapter_feat by what a trained bridge makes of it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from ezhoi_diffusion.bridge_plugin import BridgePlugin, Load
from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
    from ezhoi_diffusion.plugins import PluginManager


def load(folder: Path | None, plugins: PluginManager | None = None) -> DiffusionBridge:
    """The bridge in `folder`, made of built-in parts and those of `plugins`.

    Raises BridgeError, or EzhoiDiffusionError without a folder.
    """
    from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
    from ezhoi_diffusion.diffusion.components import components

    if folder is None:
        raise EzhoiDiffusionError("the diffusion bridge needs --bridge DIR, a folder made by `ezhoi-diffusion train`")
    return DiffusionBridge.from_pretrained(folder, registry=components(plugins) if plugins is not None else None)


class DiffusionPlugin(BridgePlugin):
    """The trained diffusion bridge, whose denoiser and sampler may be a plugin's."""

    def loader(self, plugins: PluginManager) -> Load:
        """`load` with what `plugins` contribute."""
        return functools.partial(load, plugins=plugins)


plugin = DiffusionPlugin("diffusion", load)

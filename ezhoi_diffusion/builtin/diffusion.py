"""The trained diffusion bridge: `--compare none,diffusion=DIR`, or `--plugin diffusion=DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ezhoi_diffusion.builtin.bridge_plugin import BridgePlugin
from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from ezhoi_diffusion.builtin.bridge_plugin import Load
    from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
    from ezhoi_diffusion.plugins import PluginManager


def load(folder: Path | None, plugins: PluginManager | None = None) -> DiffusionBridge:
    """Load the bridge in `folder`. Raises BridgeError, or EzhoiDiffusionError without a folder."""
    from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
    from ezhoi_diffusion.diffusion.components import components

    if folder is None:
        raise EzhoiDiffusionError(
            "the diffusion bridge needs its folder: train one with `ezhoi-diffusion train`, then give diffusion=DIR"
        )
    return DiffusionBridge.from_pretrained(folder, registry=components(plugins) if plugins is not None else None)


class DiffusionPlugin(BridgePlugin):
    """The bridge's denoiser and sampler may come from any plugin."""

    def loader(self, plugins: PluginManager) -> Load:
        """`load` with the run's plugins."""
        return lambda folder: load(folder, plugins)


plugin = DiffusionPlugin("diffusion", load)

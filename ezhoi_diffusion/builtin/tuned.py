"""The bridge that `ezhoi-diffusion tune` chose: `--compare none,tuned=DIR`, or `--plugin tuned=DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ezhoi_diffusion.builtin.bridge_plugin import BridgePlugin

if TYPE_CHECKING:
    from ezhoi_diffusion.builtin.bridge_plugin import Load
    from ezhoi_diffusion.evaluation.choice import TunedBridge
    from ezhoi_diffusion.plugins import PluginManager


def load(folder: Path | None, plugins: PluginManager | None = None) -> TunedBridge:
    """Load the choice in `folder`; it may be any bridge that a plugin registers."""
    from ezhoi_diffusion.evaluation.choice import load_choice
    from ezhoi_diffusion.plugins import PluginManager

    return load_choice(folder, plugins or PluginManager())


class TunedPlugin(BridgePlugin):
    """The chosen bridge may come from any plugin."""

    def loader(self, plugins: PluginManager) -> Load:
        """`load` with the run's plugins."""
        return lambda folder: load(folder, plugins)


plugin = TunedPlugin("tuned", load)

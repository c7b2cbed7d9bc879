"""Bridges one after the other, as a folder: `--compare none,chain=DIR`, or `--plugin chain=DIR`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from ezhoi_diffusion.builtin.bridge_plugin import BridgePlugin
from ezhoi_diffusion.errors import EzhoiDiffusionError

if TYPE_CHECKING:
    from ezhoi_diffusion.builtin.bridge_plugin import Load
    from ezhoi_diffusion.evaluation.chain import ChainBridge
    from ezhoi_diffusion.plugins import PluginManager


def load(folder: Path | None, plugins: PluginManager | None = None) -> ChainBridge:
    """Load the chain in `folder`; its members may be any bridges that plugins register."""
    from ezhoi_diffusion.evaluation.chain import CHAIN, ChainBridge, load_members
    from ezhoi_diffusion.evaluation.variants import load_bridge
    from ezhoi_diffusion.plugins import PluginManager

    if folder is None:
        raise EzhoiDiffusionError(
            "chain needs its folder: give chain=DIR, or name the bridges themselves, as NAME+NAME"
        )
    members, artifact = load_members(folder, CHAIN, functools.partial(load_bridge, plugins or PluginManager()))
    chain = ChainBridge(members)
    chain.provenance = {**artifact.provenance, **chain.provenance} if chain.provenance is not None else None
    return chain


class ChainPlugin(BridgePlugin):
    """The members may come from any plugin."""

    def loader(self, plugins: PluginManager) -> Load:
        """`load` with the run's plugins."""
        return lambda folder: load(folder, plugins)


plugin = ChainPlugin("chain", load)

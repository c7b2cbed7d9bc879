"""Plugins for EZ-HOI runs that nobody edited: capture adapter_feat, train a diffusion bridge, inject it, compare.

    from ezhoi_diffusion import add_arguments, attach     # in a fork's script
    from ezhoi_diffusion import hookimpl                  # in a plugin
    from ezhoi_diffusion import DiffusionBridge, FeatureStore
    from ezhoi_diffusion import DiffusionBridgeHOI        # where a script of the guide imports it

Names are imported when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ezhoi_diffusion.artifact import Artifact as Artifact
    from ezhoi_diffusion.artifact import BridgeError as BridgeError
    from ezhoi_diffusion.bridge_plugin import BridgePlugin as BridgePlugin
    from ezhoi_diffusion.diffusion.bridge import DiffusionBridge as DiffusionBridge
    from ezhoi_diffusion.errors import EzhoiDiffusionError as EzhoiDiffusionError
    from ezhoi_diffusion.evaluation.comparison import Comparison as Comparison
    from ezhoi_diffusion.features.batch import FeatureBatch as FeatureBatch
    from ezhoi_diffusion.features.batch import Pairs as Pairs
    from ezhoi_diffusion.features.statistics import ModalityStatistics as ModalityStatistics
    from ezhoi_diffusion.features.statistics import unit as unit
    from ezhoi_diffusion.features.store import FeatureStore as FeatureStore
    from ezhoi_diffusion.hookspecs import hookimpl as hookimpl
    from ezhoi_diffusion.host.attach import attach as attach
    from ezhoi_diffusion.host.host import Host as Host
    from ezhoi_diffusion.host.options import add_arguments as add_arguments
    from ezhoi_diffusion.host.score import Score as Score
    from ezhoi_diffusion.host.supervision import SeenPairs as SeenPairs
    from ezhoi_diffusion.host.supervision import seen_pairs as seen_pairs
    from ezhoi_diffusion.host.taps import Tap as Tap
    from ezhoi_diffusion.legacy.drop_in import DiffusionBridgeHOI as DiffusionBridgeHOI
    from ezhoi_diffusion.plugins import PluginHost as PluginHost

_WHERE = {
    "Artifact": "artifact",
    "BridgeError": "artifact",
    "BridgePlugin": "bridge_plugin",
    "Comparison": "evaluation.comparison",
    "DiffusionBridge": "diffusion.bridge",
    "DiffusionBridgeHOI": "legacy.drop_in",
    "EzhoiDiffusionError": "errors",
    "FeatureBatch": "features.batch",
    "FeatureStore": "features.store",
    "Host": "host.host",
    "ModalityStatistics": "features.statistics",
    "Pairs": "features.batch",
    "PluginHost": "plugins",
    "Score": "host.score",
    "SeenPairs": "host.supervision",
    "Tap": "host.taps",
    "add_arguments": "host.options",
    "attach": "host.attach",
    "hookimpl": "hookspecs",
    "seen_pairs": "host.supervision",
    "unit": "features.statistics",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'ezhoi_diffusion' has no attribute '{name}'")
    return getattr(import_module(f"ezhoi_diffusion.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

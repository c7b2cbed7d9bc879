"""Plugins for EZ-HOI runs that nobody edits: capture adapter_feat, train a diffusion bridge, inject it, compare.

    from ezhoi_diffusion import add_arguments, attach      # in a fork's script
    from ezhoi_diffusion import Bridge, BridgePlugin       # in a bridge's package
    from ezhoi_diffusion import DiffusionBridge, FeatureStore
    from ezhoi_diffusion import DiffusionBridgeHOI         # in a script of the training guide

Every name is imported when it is first used, so importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ezhoi_diffusion.artifact import Artifact as Artifact
    from ezhoi_diffusion.bridge import Bridge as Bridge
    from ezhoi_diffusion.bridge import BridgeError as BridgeError
    from ezhoi_diffusion.builtin.bridge_plugin import BridgePlugin as BridgePlugin
    from ezhoi_diffusion.diffusion.bridge import DiffusionBridge as DiffusionBridge
    from ezhoi_diffusion.errors import EzhoiDiffusionError as EzhoiDiffusionError
    from ezhoi_diffusion.evaluation.comparison import Comparison as Comparison
    from ezhoi_diffusion.ezhoi.attach import attach as attach
    from ezhoi_diffusion.ezhoi.feature_tap import FeatureTap as FeatureTap
    from ezhoi_diffusion.ezhoi.flags import add_arguments as add_arguments
    from ezhoi_diffusion.ezhoi.run import EzHoiRun as EzHoiRun
    from ezhoi_diffusion.features.batch import FeatureBatch as FeatureBatch
    from ezhoi_diffusion.features.batch import Pairs as Pairs
    from ezhoi_diffusion.features.labels import SeenPairs as SeenPairs
    from ezhoi_diffusion.features.labels import seen_pairs as seen_pairs
    from ezhoi_diffusion.features.score import EzHoiScore as EzHoiScore
    from ezhoi_diffusion.features.statistics import ModalityStatistics as ModalityStatistics
    from ezhoi_diffusion.features.store import FeatureStore as FeatureStore
    from ezhoi_diffusion.guide.bridge_hoi import DiffusionBridgeHOI as DiffusionBridgeHOI
    from ezhoi_diffusion.hookspecs import hookimpl as hookimpl
    from ezhoi_diffusion.plugins import PluginManager as PluginManager
    from ezhoi_diffusion.report.hub_card import push_to_hub as push_to_hub
    from ezhoi_diffusion.schema import TensorSpec as TensorSpec

_WHERE = {
    "Artifact": "artifact",
    "Bridge": "bridge",
    "BridgeError": "bridge",
    "BridgePlugin": "builtin.bridge_plugin",
    "Comparison": "evaluation.comparison",
    "DiffusionBridge": "diffusion.bridge",
    "DiffusionBridgeHOI": "guide.bridge_hoi",
    "EzHoiRun": "ezhoi.run",
    "EzhoiDiffusionError": "errors",
    "FeatureBatch": "features.batch",
    "FeatureStore": "features.store",
    "FeatureTap": "ezhoi.feature_tap",
    "ModalityStatistics": "features.statistics",
    "Pairs": "features.batch",
    "PluginManager": "plugins",
    "EzHoiScore": "features.score",
    "SeenPairs": "features.labels",
    "TensorSpec": "schema",
    "add_arguments": "ezhoi.flags",
    "attach": "ezhoi.attach",
    "hookimpl": "hookspecs",
    "push_to_hub": "report.hub_card",
    "seen_pairs": "features.labels",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'ezhoi_diffusion' has no attribute '{name}'")
    return getattr(import_module(f"ezhoi_diffusion.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

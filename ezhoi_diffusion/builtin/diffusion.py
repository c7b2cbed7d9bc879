"""`--plugin diffusion --bridge DIR`: replaces adapter_feat by what a trained bridge makes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from ezhoi_diffusion.diffusion.bridge import Components, DiffusionBridge
    from ezhoi_diffusion.host.host import Host
    from ezhoi_diffusion.plugins import PluginHost


def components(plugins: PluginHost) -> Components:
    """The built-in denoisers and samplers, and those that plugins contribute. Raises PluginError."""
    from ezhoi_diffusion.diffusion.bridge import Components

    parts = Components()
    plugins.collect("register_denoisers", parts.denoisers)
    plugins.collect("register_samplers", parts.samplers)
    return parts


def load(plugins: PluginHost, folder: Path | None) -> DiffusionBridge:
    """The bridge in `folder`. Raises BridgeError, or EzhoiDiffusionError without a folder."""
    from ezhoi_diffusion.diffusion.bridge import DiffusionBridge

    if folder is None:
        raise EzhoiDiffusionError("the diffusion bridge needs --bridge DIR, a folder made by `ezhoi-diffusion train`")
    return DiffusionBridge.from_pretrained(folder, registry=components(plugins))


class DiffusionPlugin:
    """Loads the bridge on attach, applies it at eval."""

    def __init__(self) -> None:
        self._bridge: DiffusionBridge | None = None

    @hookimpl
    def register_bridges(
        self, register: Callable[[str, Callable[[Path | None], Any]], None], plugins: PluginHost
    ) -> None:
        """Contribute `diffusion`."""
        register("diffusion", functools.partial(load, plugins))

    @hookimpl
    def on_attach(self, host: Host) -> None:
        """Load the bridge and hold it against the host."""
        if host.args.compare:
            return  # the comparison loads its own
        self._bridge = load(host.plugins, Path(host.args.bridge) if host.args.bridge else None)
        host.accept(self._bridge, "diffusion")
        self._bridge.to(host.device)

    @hookimpl
    def post_adapter_feat(self, adapter_feat: Tensor, context: Pairs) -> Tensor | None:
        """[P, D] -> [P, D]."""
        bridged: Tensor | None = self._bridge(adapter_feat) if self._bridge is not None else None
        return bridged

    @hookimpl
    def on_detach(self, host: Host) -> None:
        """Let the bridge go."""
        self._bridge = None


plugin = DiffusionPlugin()

"""A bridge as a plugin: fitted, compared and injected by its name, with two functions of its author."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from ezhoi_diffusion.artifact import Artifact
    from ezhoi_diffusion.ezhoi.run import EzHoiRun
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.registry import Register

Bridge = Callable[["Tensor"], "Tensor"]
Load = Callable[[Path | None], Bridge]
Fit = Callable[..., "Artifact"]


class BridgePlugin:
    """`--compare none,NAME=DIR`, `--plugin NAME --bridge DIR`, and with `fit` `ezhoi-diffusion fit NAME FEATURES --out DIR`.

    load(folder) returns what replaces adapter_feat, a callable [P, D] -> [P, D]; folder is None where the user gave none.
    fit(features, **options) makes, from a FeatureStore of training images, the Artifact that `load` reads. See the hooks
    `register_bridges` and `register_fits` for both contracts.
    """

    def __init__(self, name: str, load: Load, fit: Fit | None = None) -> None:
        self.name, self.load, self.fit = name, load, fit
        self._bridge: Bridge | None = None

    def loader(self, plugins: PluginManager) -> Load:
        """`load`; for a bridge that needs what other plugins contribute, the place to take it from `plugins`."""
        return self.load

    @hookimpl
    def register_bridges(self, register: Register[Load], plugins: PluginManager) -> None:
        """Contribute the bridge by its name."""
        register(self.name, self.loader(plugins))

    @hookimpl
    def register_fits(self, register: Register[Fit]) -> None:
        """Contribute how it is fitted."""
        if self.fit is not None:
            register(self.name, self.fit)

    @hookimpl
    def on_attach(self, run: EzHoiRun) -> None:
        """Load the bridge and hold it against the host."""
        from torch import nn

        from ezhoi_diffusion.evaluation.variants import with_steps
        from ezhoi_diffusion.hub import local

        if run.args.compare:
            return  # the comparison loads its own
        bridge: Any = self.loader(run.plugins)(local(run.args.bridge) if run.args.bridge else None)
        bridge = with_steps(bridge, run.args.inference_steps)
        run.accept(bridge, self.name)
        if isinstance(bridge, nn.Module):
            bridge.to(run.device)
        self._bridge = bridge

    @hookimpl
    def post_adapter_feat(self, adapter_feat: Tensor, context: Pairs) -> Tensor | None:
        """[P, D] -> [P, D]."""
        return self._bridge(adapter_feat) if self._bridge is not None else None

    @hookimpl
    def on_detach(self, run: EzHoiRun) -> None:
        """Let the bridge go."""
        self._bridge = None

"""A bridge as a plugin: two functions of its author make it fitted, compared and injected by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ezhoi_diffusion.defaults import torch_defaults
from ezhoi_diffusion.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from ezhoi_diffusion.artifact import Artifact
    from ezhoi_diffusion.bridge import Bridge
    from ezhoi_diffusion.ezhoi.run import EzHoiRun
    from ezhoi_diffusion.features.batch import Pairs
    from ezhoi_diffusion.plugins import PluginManager
    from ezhoi_diffusion.registry import Register

    Load = Callable[[Path | None], Bridge | Callable[[Tensor], Tensor]]
    Fit = Callable[..., Artifact]


class BridgePlugin:
    """Contributes one bridge under `name`.

    Args:
        name: What `--plugin NAME`, `--compare none,NAME=DIR` and `train --bridge NAME` call it.
        load: `load(folder)` returns a Bridge, or a function on features [P, D]. `folder` is None where the user names none.
        fit: `fit(features, **options)` makes the Artifact that `load` reads from a FeatureStore of training images, or of
            test images without annotations (see `features.unlabelled.learns_from_test_images`). None where there is nothing
            to fit. The hooks `register_bridges` and `register_fits` have both contracts.
    """

    def __init__(self, name: str, load: Load, fit: Fit | None = None) -> None:
        self.name, self.load, self.fit = name, load, fit
        self._bridge: Bridge | None = None

    def loader(self, plugins: PluginManager) -> Load:
        """`load`; a bridge that needs what other plugins contribute overrides this and takes it from `plugins`."""
        return self.load

    @hookimpl
    def register_bridges(self, register: Register[Load], plugins: PluginManager) -> None:
        """Register the loader."""
        register(self.name, self.loader(plugins))

    @hookimpl
    def register_fits(self, register: Register[Fit]) -> None:
        """Register the fit."""
        if self.fit is not None:
            register(self.name, self.fit)

    @hookimpl
    def on_attach(self, run: EzHoiRun) -> None:
        """Load the bridge of `--plugin NAME[=DIR]` and check its fingerprint."""
        if run.args.compare:
            return  # the comparison loads its own
        from ezhoi_diffusion.evaluation.variants import parse_settings, resolve_variants

        own = run.args.plugin_folders.get(self.name)
        variants = resolve_variants(
            f"{self.name}={own}" if own else self.name,
            run.plugins,
            folder=run.args.bridge,
            check=run.check_fingerprint,
            device=run.device,
            settings=parse_settings(run.args.set, run.args.inference_steps),
            skip_unknown=True,  # another enabled bridge may have it; the run checks that one does
        )
        if len(variants) > 1:
            from ezhoi_diffusion.bridge import BridgeError

            raise BridgeError(f"{own or run.args.bridge} holds several seeds: name one of {', '.join(variants)}")
        variant = next(iter(variants.values()))
        applied = variant.source.settings if variant.source else {}
        run.applied_settings.update(*([key, f"{self.name}.{key}"] for key in applied))
        self._bridge = variant.bridge

    @hookimpl
    def post_adapter_feat(self, adapter_feat: Tensor, pairs: Pairs) -> Tensor | None:
        """Replace the features [P, D] of an image."""
        if self._bridge is None:
            return None
        with torch_defaults():
            bridged: Tensor = self._bridge(adapter_feat, pairs)
        return bridged

    @hookimpl
    def on_detach(self, run: EzHoiRun) -> None:
        """Let the bridge go."""
        self._bridge = None

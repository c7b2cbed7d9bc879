"""What a comparison names, as callables on one image's features."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.comparison import REFERENCE
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.host.taps import Inject, check_replacement
from ezhoi_diffusion.plugins import PluginHost
from ezhoi_diffusion.registry import Registry

Bridge = Callable[[Tensor], Tensor]


def known_bridges(plugins: PluginHost) -> Registry[Callable[[Path | None], Bridge]]:
    """The bridges that installed plugins contribute, by name."""
    empty: dict[str, Callable[[Path | None], Bridge]] = {}
    return plugins.collect("register_bridges", Registry("bridge", empty))


def set_steps(bridge: object, steps: int | None) -> None:
    """Apply a bridge that can be applied so from level `steps` with as many evaluations; None leaves it as it is."""
    override = getattr(bridge, "override", None)
    if steps is not None and override is not None:
        override(start_step=steps, steps=steps)


def resolve_variants(
    names: str, plugins: PluginHost, folder: str, accept: Callable[[object, str], None], device: torch.device
) -> dict[str, Inject]:
    """`none,NAME,NAME=DIR,…` as callables on one image's features. Raises EzhoiDiffusionError for an unknown name.

    NAME is a registered bridge, loaded from DIR or from `folder`; or an enabled plugin with post_adapter_feat.
    accept(bridge, name) raises where a bridge is not for this host.
    """
    bridges = known_bridges(plugins)
    variants: dict[str, Inject] = {}
    for item in filter(None, (part.strip() for part in names.split(","))):
        name, _, own_folder = item.partition("=")
        if name == REFERENCE:
            continue
        if item in variants:
            raise EzhoiDiffusionError(f"the comparison names '{item}' twice")
        if name in bridges.names():
            path = own_folder or folder
            bridge = _loaded(bridges[name], Path(path) if path else None, name)
            accept(bridge, item)
            if isinstance(bridge, nn.Module):
                bridge.to(device)
            variants[item] = _checked(bridge, item)
        elif not own_folder and name in plugins.implementing("post_adapter_feat"):
            variants[item] = functools.partial(_folded, plugins, name)
        else:
            known = ", ".join([REFERENCE, *bridges.names()])
            raise EzhoiDiffusionError(
                f"there is no bridge '{name}'; known are {known}, and in a run of the host plugins with post_adapter_feat that "
                f"are enabled with --plugin"
            )
    if not variants:
        raise EzhoiDiffusionError("a comparison needs a bridge beside `none`, e.g. none,diffusion and --bridge DIR")
    return variants


def _loaded(load: Callable[[Path | None], Bridge], folder: Path | None, name: str) -> Bridge:
    try:
        return load(folder)
    except EzhoiDiffusionError:
        raise
    except Exception as error:  # a third party's, which may raise anything
        raise EzhoiDiffusionError(f"bridge '{name}' could not be loaded: {type(error).__name__}: {error}") from error


def _checked(bridge: Bridge, name: str) -> Inject:
    def inject(feature: Tensor, pairs: Pairs) -> Tensor:
        try:
            replaced = bridge(feature)
        except EzhoiDiffusionError:
            raise
        except Exception as error:
            raise EzhoiDiffusionError(f"bridge '{name}' raised {type(error).__name__}: {error}") from error
        problem = check_replacement(feature, replaced)
        if problem:
            raise EzhoiDiffusionError(f"bridge '{name}' {problem}")
        return replaced

    return inject


def _folded(plugins: PluginHost, name: str, feature: Tensor, pairs: Pairs) -> Tensor:
    return plugins.fold("post_adapter_feat", feature, check_replacement, only=name, context=pairs)

"""What `--compare` names, as callables on one image's features."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.comparison import REFERENCE
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.host.host import Host
from ezhoi_diffusion.host.taps import Inject, check_replacement
from ezhoi_diffusion.plugins import PluginHost
from ezhoi_diffusion.registry import Registry

Bridge = Callable[[Tensor], Tensor]


def resolve_variants(host: Host, names: str) -> dict[str, Inject]:
    """`none,NAME,NAME=DIR,…` as callables on one image's features. Raises EzhoiDiffusionError for an unknown name.

    NAME is a registered bridge, loaded from DIR or from `--bridge`; or an enabled plugin with post_adapter_feat.
    """
    empty: dict[str, Callable[[Path | None], Bridge]] = {}
    bridges = host.plugins.collect("register_bridges", Registry("bridge", empty))
    variants: dict[str, Inject] = {}
    for item in filter(None, (part.strip() for part in names.split(","))):
        name, _, folder = item.partition("=")
        if name == REFERENCE:
            continue
        if item in variants:
            raise EzhoiDiffusionError(f"--compare names '{item}' twice")
        if name in bridges.names():
            path = folder or host.args.bridge
            bridge = _loaded(bridges[name], Path(path) if path else None, name)
            host.accept(bridge, item)
            if isinstance(bridge, nn.Module):
                bridge.to(host.device)
            variants[item] = _checked(bridge, item)
        elif not folder and name in host.plugins.implementing("post_adapter_feat"):
            variants[item] = functools.partial(_folded, host.plugins, name)
        else:
            known = ", ".join([REFERENCE, *bridges.names()])
            raise EzhoiDiffusionError(
                f"--compare: there is no bridge '{name}'; known are {known}, and plugins with post_adapter_feat that are "
                f"enabled with --plugin"
            )
    if not variants:
        raise EzhoiDiffusionError("--compare needs a bridge beside `none`, e.g. --compare none,diffusion --bridge DIR")
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

"""What a comparison names, as callables on features."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ezhoi_diffusion.artifact import CONFIG
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.comparison import REFERENCE
from ezhoi_diffusion.ezhoi.feature_tap import Inject, check_replacement
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.files import current
from ezhoi_diffusion.hub import local
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.registry import Registry

Bridge = Callable[[Tensor], Tensor]
SEED = "seed-"  # folders of a bridge that was trained with several seeds


@dataclass(frozen=True)
class Variant:
    """One way of replacing adapter_feat.

    inject: one image's features [P, D] and its pairs -> their replacement, None for no change. rows: the same for rows
    [N, D] of many images, where the bridge takes each row by itself. family: what it is one seed of. control: it is
    there to be beaten. provenance: where it comes from, and how it is applied. source: the bridge's
    registered name, the folder it was loaded from, and the settings of a sweep that it is applied with.
    """

    inject: Inject
    rows: Bridge | None = None
    seed_group: str | None = None
    control: bool = False
    provenance: dict[str, Any] | None = None
    source: tuple[str, Path | None, dict[str, Any]] | None = None


def known_bridges(plugins: PluginManager) -> Registry[Callable[[Path | None], Bridge]]:
    """The bridges that installed plugins contribute, by name."""
    empty: dict[str, Callable[[Path | None], Bridge]] = {}
    return plugins.collect("register_bridges", Registry("bridge", empty))


def with_steps(bridge: Any, num_steps: int | None) -> Any:
    """A bridge that can be applied so, from level `steps` with as many evaluations; None leaves it as it is."""
    override = getattr(bridge, "override", None)
    return bridge if num_steps is None or override is None else override(start_timestep=num_steps, num_steps=num_steps)


def parse_sweep(words: Sequence[str]) -> dict[str, list[Any]]:
    """`start_timestep=50,100 blend=0.5,1` as lists of values. Raises EzhoiDiffusionError."""
    grid: dict[str, list[Any]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not name or not equals or not values or name in grid:
            raise EzhoiDiffusionError(
                f"--sweep {word}: give each setting once, as NAME=VALUE,VALUE,…, for example --sweep start_timestep=50,100,200"
            )
        grid[name.replace("-", "_")] = [parse_value(text) for text in values.split(",")]
    return grid


def parse_value(text: str) -> Any:
    """A value on the command line: JSON or a number where it is one, else the text itself."""
    for parse in (json.loads, float):
        with suppress(ValueError):
            return parse(text)
    return text


def _with_steps_of(label: str, bridge: Any, num_steps: int | None) -> Any:
    try:
        return with_steps(bridge, num_steps)
    except EzhoiDiffusionError as error:
        raise EzhoiDiffusionError(f"--inference-steps {num_steps} cannot be used with '{label}': {error}") from error


def resolve_variants(
    names: str,
    plugins: PluginManager,
    folder: str,
    accept: Callable[[object, str], None],
    device: torch.device,
    *,
    num_steps: int | None = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    asked: bool = True,
) -> dict[str, Variant]:
    """`none,NAME,NAME=DIR,…` as variants by name. Raises EzhoiDiffusionError for an unknown name.

    NAME is a registered bridge, loaded from DIR or from `folder`, either of which may be the Hub's hf:USER/NAME[@REVISION];
    or an enabled plugin with post_adapter_feat. A DIR that holds the seeds of one training gives a variant for each. accept(bridge, name) raises where a bridge is not for this
    host. steps: see `with_steps`. sweep: every bridge is also taken at each point of what this grid has of its `settings`; asked: by
    the user, who is told where no bridge has one of them.
    """
    bridges = known_bridges(plugins)
    variants: dict[str, Variant] = {}
    swept: set[str] = set()
    for item in filter(None, (part.strip() for part in names.split(","))):
        name, _, own_folder = item.partition("=")
        if name == REFERENCE:
            continue
        if item in variants:
            raise EzhoiDiffusionError(f"the comparison names '{item}' twice")
        if name in bridges.names():
            for label, path in _seeds(item, own_folder or folder):
                bridge = _with_steps_of(label, _loaded(bridges[name], path, name), num_steps)
                seeded = getattr(bridge, "depends_on_seed", False)
                label = label if seeded else item
                accept(bridge, label)
                if isinstance(bridge, nn.Module):
                    bridge.to(device)
                swept |= set(_settings(bridge))
                for settings, applied in _swept(bridge, label, sweep or {}, asked):
                    point = f"[{','.join(f'{key}={value}' for key, value in settings.items())}]" if settings else ""
                    seed_group = item + point if label != item else None
                    variants[label + point] = _variant(applied, label + point, seed_group, (name, path, settings))
                if not seeded:
                    break
        elif not own_folder and name in plugins.implementing("post_adapter_feat"):
            variants[item] = Variant(functools.partial(_folded, plugins, name))
        else:
            known = ", ".join([REFERENCE, *bridges.names()])
            raise EzhoiDiffusionError(
                f"there is no bridge '{name}'; known are {known}, and in a run of the host plugins with post_adapter_feat that "
                f"are enabled with --plugin"
            )
    if not variants:
        raise EzhoiDiffusionError("a comparison needs a bridge beside `none`, e.g. none,diffusion and --bridge DIR")
    unknown = sorted(set(sweep or {}) - swept)
    if asked and unknown:
        raise EzhoiDiffusionError(
            f"none of {', '.join(variants)} has a setting {', '.join(unknown)} to sweep; they have "
            f"{', '.join(sorted(swept)) or 'none'}"
        )
    return variants


def origins(variants: Mapping[str, Variant]) -> dict[str, Any]:
    """Name -> provenance of every variant that has one."""
    return {name: variant.provenance for name, variant in variants.items() if variant.provenance is not None}


def seed_groups(variants: Mapping[str, Variant]) -> dict[str, list[str]]:
    """Name of a bridge that was trained with several seeds -> its variants."""
    found: dict[str, list[str]] = {}
    for name, variant in variants.items():
        if variant.seed_group is not None:
            found.setdefault(variant.seed_group, []).append(name)
    return found


def _seeds(item: str, folder: str) -> list[tuple[str, Path | None]]:
    """(name, folder) of every seed of a training in `folder`; of the bridge in it where it is one."""
    if not folder:
        return [(item, None)]
    path = local(folder)
    seeds = sorted(path.glob(f"{SEED}*/"), key=lambda seed: (len(seed.name), seed.name))
    if not seeds or current(path, CONFIG).exists():
        return [(item, path)]
    return [(f"{item}/{seed.name}", seed) for seed in seeds]


def _settings(bridge: object) -> tuple[str, ...]:
    return tuple(getattr(bridge, "settings", ())) if hasattr(bridge, "sweep") else ()


def _swept(
    bridge: Any, label: str, grid: Mapping[str, Sequence[Any]], asked: bool
) -> list[tuple[dict[str, Any], Bridge]]:
    """The bridge as it is, and at every point of what the grid has of its settings; what it refuses is an error if asked for."""
    own = {name: values for name, values in grid.items() if name in _settings(bridge)}
    if not own:
        return [({}, bridge)]
    points = [dict(zip(own, values, strict=True)) for values in itertools.product(*own.values())]

    def sweep(chosen: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Bridge]]:
        try:
            return list(zip(chosen, bridge.sweep(chosen), strict=True))
        except EzhoiDiffusionError as error:
            raise EzhoiDiffusionError(f"bridge '{label}': {error}") from error
        except Exception as error:  # a third party's, which may raise anything
            raise EzhoiDiffusionError(f"bridge '{label}' cannot be swept: {type(error).__name__}: {error}") from error

    def possible(point: dict[str, Any]) -> bool:
        try:
            bridge.sweep([point])
        except EzhoiDiffusionError:
            return False
        except Exception:  # no refusal: the sweep below tells of it
            return True
        return True

    return [({}, bridge), *sweep(points if asked else [point for point in points if possible(point)])]


def _loaded(load: Callable[[Path | None], Bridge], folder: Path | None, name: str) -> Bridge:
    try:
        return load(folder)
    except EzhoiDiffusionError:
        raise
    except Exception as error:  # a third party's, which may raise anything
        raise EzhoiDiffusionError(f"bridge '{name}' could not be loaded: {type(error).__name__}: {error}") from error


def _variant(
    bridge: Bridge, name: str, seed_group: str | None, source: tuple[str, Path | None, dict[str, Any]]
) -> Variant:
    def rows(feature: Tensor) -> Tensor:
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

    def inject(feature: Tensor, pairs: Pairs) -> Tensor:
        return rows(feature)

    by_row, control = (bool(getattr(bridge, name, False)) for name in ("row_by_row", "control"))
    provenance = getattr(bridge, "provenance", None)
    return Variant(inject, rows if by_row else None, seed_group, control, provenance, source)


def _folded(plugins: PluginManager, name: str, feature: Tensor, pairs: Pairs) -> Tensor:
    return plugins.fold("post_adapter_feat", feature, check_replacement, only=name, context=pairs)

"""The bridges that a command names, loaded and ready to apply."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.artifact import CONFIG
from ezhoi_diffusion.bridge import Bridge, BridgeError, as_bridge, replacement_problem
from ezhoi_diffusion.errors import EzhoiDiffusionError, attributed_to
from ezhoi_diffusion.evaluation.comparison import REFERENCE
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.files import current
from ezhoi_diffusion.hub import resolve_path
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.registry import Registry

Load = Callable[[Path | None], object]
SEED_PREFIX = "seed-"  # folders of a bridge that was trained with several seeds


@dataclass(frozen=True, eq=False)
class Source:
    """Where a variant comes from: registered name, folder, and the settings of its point of a sweep."""

    name: str
    folder: Path | None
    settings: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Variant:
    """One bridge of a comparison.

    Attributes:
        name: What the command and its tables call it.
        bridge: The bridge, on its device.
        seed_group: The variant's name without its seed, where a training has several seeds.
        source: Where it was loaded from; None for a plugin that only has `post_adapter_feat`.
    """

    name: str
    bridge: Bridge
    seed_group: str | None = None
    source: Source | None = None

    @property
    def takes_many_images(self) -> bool:
        """Whether features of many images may come in one call."""
        return self.bridge.row_by_row and not self.bridge.needs_pairs

    def apply(self, features: Tensor, pairs: Pairs | None) -> Tensor:
        """Bridge features [P, D], those of one image with its pairs.

        Raises:
            BridgeError: The bridge raises something, or returns no finite [P, D] of the same dtype and device.
        """
        with attributed_to(f"bridge '{self.name}'", BridgeError):
            bridged: Tensor = self.bridge(features, pairs)
        problem = replacement_problem(features, bridged)
        if problem:
            raise BridgeError(f"bridge '{self.name}' {problem}")
        return bridged


class _PluginBridge(Bridge):
    """An enabled plugin that has `post_adapter_feat` and registers no bridge."""

    needs_pairs = True

    def __init__(self, plugins: PluginManager, name: str) -> None:
        super().__init__()
        self._plugins, self._name = plugins, name

    def forward(self, adapter_feat: Tensor, pairs: Pairs | None = None) -> Tensor:
        return self._plugins.fold("post_adapter_feat", adapter_feat, replacement_problem, only=self._name, pairs=pairs)


def known_bridges(plugins: PluginManager) -> Registry[Load]:
    """The loaders of all bridges that installed plugins register, by name."""
    empty: dict[str, Load] = {}
    return plugins.collect("register_bridges", Registry("bridge", empty))


def load_bridge(plugins: PluginManager, name: str, folder: Path | None) -> Bridge:
    """Load one registered bridge. Raises EzhoiDiffusionError for an unknown name, BridgeError where loading fails."""
    load = known_bridges(plugins)[name]
    with attributed_to(f"loading bridge '{name}'", BridgeError):
        return as_bridge(load(folder))


# -- values on the command line ------------------------------------------------------------------------------------


def parse_value(text: str) -> Any:
    """JSON or a number where `text` is one, else the text itself."""
    for parse in (json.loads, float):
        with suppress(ValueError):
            return parse(text)
    return text


def parse_settings(words: Sequence[str], inference_steps: int | None = None) -> dict[str, Any]:
    """`--set` words such as `blend=0.3` as a dictionary.

    Args:
        words: KEY=VALUE each; dashes in KEY become underscores.
        inference_steps: N of `--inference-steps`, which sets start_timestep and num_steps to N.

    Raises:
        EzhoiDiffusionError: A word has no value, or a key comes twice.
    """
    settings: dict[str, Any] = {}
    if inference_steps is not None:
        settings = {"start_timestep": inference_steps, "num_steps": inference_steps}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.replace("-", "_")
        if not key or not equals or not value:
            raise EzhoiDiffusionError(f"--set {word}: write KEY=VALUE, for example --set blend=0.3")
        if key in settings:
            raise EzhoiDiffusionError(f"--set {word}: {key} is set twice (--inference-steps sets two); set it once")
        settings[key] = parse_value(value)
    return settings


def parse_sweep(words: Sequence[str]) -> dict[str, list[Any]]:
    """`--sweep` words such as `blend=0.3,1` as lists of values. Raises EzhoiDiffusionError."""
    points: dict[str, list[Any]] = {}
    for word in words:
        key, equals, values = word.partition("=")
        key = key.replace("-", "_")
        if not key or not equals or not values or key in points:
            raise EzhoiDiffusionError(
                f"--sweep {word}: write each setting once, as KEY=VALUE,VALUE,…, for example --sweep start_timestep=50,100"
            )
        points[key] = [parse_value(text) for text in values.split(",")]
    return points


# -- names as variants -----------------------------------------------------------------------------------------------


def resolve_variants(
    spec: str,
    plugins: PluginManager,
    *,
    folder: str = "",
    check: Callable[[Bridge, str], None],
    device: torch.device | str,
    settings: Mapping[str, Any] | None = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    skip_refused: bool = False,
    skip_unknown: bool = False,
) -> dict[str, Variant]:
    """Load the bridges that `none,NAME,NAME=DIR,…` names.

    Args:
        spec: NAME is a registered bridge, or an enabled plugin with `post_adapter_feat`. DIR is a folder or
            hf:USER/NAME[@REVISION]; a folder with `seed-*` folders gives one variant for each.
        plugins: The plugin manager.
        folder: DIR for names without one of their own.
        check: Called as check(bridge, name); raises where the bridge does not fit the run.
        device: Where the bridges go.
        settings: Applied to every bridge that has them.
        sweep: Every bridge is also taken at each point of what this has of its settings.
        skip_refused: Leave out of the sweep what no bridge has and points that a bridge refuses, as for a default grid.
        skip_unknown: Leave out settings that no bridge has. `Source.settings` has those that were applied.

    Returns:
        Variants by name, without `none`.

    Raises:
        EzhoiDiffusionError: A name is unknown or comes twice, there is none, or no bridge has a setting.
    """
    settings, sweep = settings or {}, sweep or {}
    bridges = known_bridges(plugins)
    variants: dict[str, Variant] = {}
    for item in filter(None, (part.strip() for part in spec.split(","))):
        name, _, own_folder = item.partition("=")
        if name == REFERENCE:
            continue
        if item in variants:
            raise EzhoiDiffusionError(f"'{item}' is named twice; name it once")
        if name in bridges.names():
            for variant in _loaded(item, name, own_folder or folder, plugins, settings, sweep, skip_refused, check):
                variant.bridge.to(device)
                variants[variant.name] = variant
        elif not own_folder and name in plugins.implementing("post_adapter_feat"):
            variants[item] = Variant(item, _PluginBridge(plugins, name))
        else:
            known = ", ".join([REFERENCE, *bridges.names()])
            raise EzhoiDiffusionError(
                f"there is no bridge '{name}'. Known bridges: {known}; in a run of EZ-HOI also plugins with post_adapter_feat "
                f"that --plugin enables. `ezhoi-diffusion plugins` lists what is installed"
            )
    if not variants:
        raise EzhoiDiffusionError(
            "only `none` is named; name a bridge beside it, e.g. none,diffusion with --bridge DIR"
        )
    _require_known({*(() if skip_unknown else settings), *(() if skip_refused else sweep)}, variants)
    return variants


def _loaded(
    item: str,
    name: str,
    where: str,
    plugins: PluginManager,
    settings: Mapping[str, Any],
    sweep: Mapping[str, Sequence[Any]],
    skip_refused: bool,
    check: Callable[[Bridge, str], None],
) -> Iterator[Variant]:
    """The variants of one name: its seeds, each as it is and at every point of the sweep."""
    for label, path in _seeds(item, where):
        bridge = load_bridge(plugins, name, path)
        label = label if bridge.seeded else item
        chosen = {key: value for key, value in settings.items() if key in bridge.settings}
        if chosen:
            bridge = _overridden(bridge, label, chosen)
        check(bridge, label)
        for point, applied in _points(bridge, label, sweep, skip_refused):
            suffix = f"[{','.join(f'{key}={value}' for key, value in point.items())}]" if point else ""
            group = item + suffix if label != item else None
            yield Variant(label + suffix, applied, group, Source(name, path, {**chosen, **point}))
        if not bridge.seeded:
            return


def _points(
    bridge: Bridge, label: str, sweep: Mapping[str, Sequence[Any]], skip_refused: bool
) -> list[tuple[dict[str, Any], Bridge]]:
    """The bridge as it is, and at every point of what the sweep has of its settings."""
    own = {key: values for key, values in sweep.items() if key in bridge.settings}
    points = [dict(zip(own, values, strict=True)) for values in itertools.product(*own.values())] if own else []
    with _naming(label):
        if skip_refused:
            points = [point for point in points if _accepts(bridge, point)]
        return [({}, bridge), *zip(points, bridge.sweep(points), strict=True)]


def _accepts(bridge: Bridge, point: Mapping[str, Any]) -> bool:
    try:
        bridge.override(**point)
    except EzhoiDiffusionError:
        return False
    return True


def _overridden(bridge: Bridge, label: str, settings: Mapping[str, Any]) -> Bridge:
    with _naming(label):
        return bridge.override(**settings)


@contextmanager
def _naming(label: str) -> Iterator[None]:
    """Errors inside name the bridge."""
    try:
        with attributed_to("a setting", BridgeError):
            yield
    except EzhoiDiffusionError as error:
        raise BridgeError(f"bridge '{label}': {error}") from error


def _seeds(item: str, where: str) -> list[tuple[str, Path | None]]:
    """(name, folder) of every seed of the training in a folder, or of the one bridge in it."""
    if not where:
        return [(item, None)]
    path = resolve_path(where)
    seeds = sorted(path.glob(f"{SEED_PREFIX}*/"), key=lambda seed: (len(seed.name), seed.name))
    if not seeds or current(path, CONFIG).exists():
        return [(item, path)]
    return [(f"{item}/{seed.name}", seed) for seed in seeds]


def _require_known(names: set[str], variants: Mapping[str, Variant]) -> None:
    known = {setting for variant in variants.values() for setting in variant.bridge.settings}
    unknown = sorted(names - known)
    if unknown:
        raise EzhoiDiffusionError(
            f"none of {', '.join(variants)} has a setting {', '.join(unknown)}; they have "
            f"{', '.join(sorted(known)) or 'none'}"
        )

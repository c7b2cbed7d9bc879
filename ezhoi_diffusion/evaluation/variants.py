"""The bridges that a command names, loaded and ready to apply."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.artifact import CONFIG
from ezhoi_diffusion.bridge import Bridge, BridgeError, as_bridge, replacement_problem
from ezhoi_diffusion.defaults import torch_defaults
from ezhoi_diffusion.errors import EzhoiDiffusionError, attributed_to
from ezhoi_diffusion.evaluation.chain import ChainBridge, own_settings, with_members
from ezhoi_diffusion.evaluation.comparison import REFERENCE
from ezhoi_diffusion.evaluation.plugin_bridge import PluginBridge
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
        """Bridge features [P, D], those of one image with its pairs. The result is the caller's own.

        Raises:
            BridgeError: The bridge raises something, or returns no finite [P, D] of the same dtype and device.
        """
        with torch_defaults(), attributed_to(f"bridge '{self.name}'", BridgeError):
            bridged: Tensor = self.bridge(features, pairs)
        problem = replacement_problem(features, bridged)
        if problem:
            raise BridgeError(f"bridge '{self.name}' {problem}")
        return bridged.clone()  # it may be a buffer, which the next call overwrites


def known_bridges(plugins: PluginManager) -> Registry[Load]:
    """The loaders of all bridges that installed plugins register, by name."""
    empty: dict[str, Load] = {}
    return plugins.collect("register_bridges", Registry("bridge", empty))


def load_bridge(plugins: PluginManager, name: str, folder: Path | None) -> Bridge:
    """Load one registered bridge. Raises EzhoiDiffusionError for an unknown name, BridgeError where loading fails."""
    load = known_bridges(plugins)[name]
    try:
        with torch_defaults(), attributed_to(f"loading bridge '{name}'", BridgeError):
            bridge = as_bridge(load(folder))
    except BridgeError as error:
        if folder is None or str(folder) in str(error):
            raise
        raise BridgeError(f"{folder}: {error}") from error
    features = (bridge.provenance or {}).get("features")
    if isinstance(features, dict) and features.get("split") == "test" and bridge.protocol != "test-transductive":
        raise BridgeError(
            f"bridge '{name}' was fitted to test images and says that it is {bridge.protocol}: ask its author to set "
            f'protocol = "test-transductive"'
        )
    return bridge


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
        words: KEY=VALUE or NAME.KEY=VALUE each; dashes in KEY become underscores.
        inference_steps: N of `--inference-steps`, which sets start_timestep and num_steps to N.

    Raises:
        EzhoiDiffusionError: A word has no value, or a key comes twice.
    """
    settings: dict[str, Any] = {}
    if inference_steps is not None:
        settings = {"start_timestep": inference_steps, "num_steps": inference_steps}
    for word in words:
        key, equals, value = word.partition("=")
        key = _setting(key)
        if not key or not equals or not value:
            raise EzhoiDiffusionError(f"--set {word}: write KEY=VALUE, for example --set blend=0.3")
        if key in settings:
            raise EzhoiDiffusionError(f"--set {word}: {key} is set twice (--inference-steps sets two); set it once")
        settings[key] = parse_value(value)
    return settings


def _setting(key: str) -> str:
    """KEY or NAME.KEY of a setting; dashes of KEY become underscores."""
    name, dot, own = key.rpartition(".")
    return name + dot + own.replace("-", "_")


def parse_sweep(words: Sequence[str]) -> dict[str, list[Any]]:
    """`--sweep` words such as `blend=0.3,1` as lists of values. Raises EzhoiDiffusionError."""
    points: dict[str, list[Any]] = {}
    for word in words:
        key, equals, values = word.partition("=")
        key = _setting(key)
        if not key or not equals or not values or key in points:
            raise EzhoiDiffusionError(
                f"--sweep {word}: write each setting once, as KEY=VALUE,VALUE,…, for example --sweep start_timestep=50,100"
            )
        points[key] = [parse_value(text) for text in values.split(",")]
    return points


# -- names as variants -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """One bridge as a command names it.

    Attributes:
        name: Its name.
        folder: DIR of NAME=DIR; empty where the command gives none.
    """

    name: str
    folder: str


def parse_bridges(spec: str, known: Collection[str]) -> dict[str, list[Named]]:
    """`none,NAME,NAME=DIR,NAME=DIR+NAME,…` as items with the bridges that each chains, `none` left out.

    Args:
        spec: The words.
        known: Names of bridges.

    Raises:
        EzhoiDiffusionError: An item comes twice, or names a bridge twice.
    """
    items: dict[str, list[Named]] = {}
    for item in filter(None, (part.strip() for part in _items(spec))):
        if item == REFERENCE:
            continue
        if item in items:
            raise EzhoiDiffusionError(f"'{item}' is named twice; name it once")
        items[item] = parse_chain(item, known)
    return items


def _items(spec: str) -> Iterator[str]:
    """Split at commas, save those in the name of a folder that exists."""
    words = spec.split(",")
    while words:
        start = words[0].rfind("=") + 1  # of a folder; 0 where none is named
        # os.path, because Path raises where the name is too long
        ends = [n for n in range(len(words), 1, -1) if start and os.path.isdir(",".join(words[:n])[start:])]  # noqa: PTH112
        count = ends[0] if ends else 1
        yield ",".join(words[:count])
        del words[:count]


def parse_chain(item: str, known: Collection[str]) -> list[Named]:
    """NAME, NAME=DIR, or several joined by "+". A "+" inside DIR stays one where no known bridge follows it.

    Raises:
        EzhoiDiffusionError: A bridge is named twice.
    """
    words: list[str] = []
    for word in item.split("+"):
        if words and "=" in words[-1] and word.partition("=")[0].strip() not in known:
            words[-1] += f"+{word}"
        else:
            words.append(word)
    named = [Named(name.strip(), folder) for name, _, folder in (word.partition("=") for word in words)]
    if len({one.name for one in named}) < len(named):
        raise EzhoiDiffusionError(f"'{item}' chains a bridge with itself; name each bridge of a chain once")
    return named


def resolve_variants(
    spec: str,
    plugins: PluginManager,
    *,
    folder: str = "",
    check: Callable[[Bridge, str], None],
    device: torch.device | str,
    settings: Mapping[str, Any] | None = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    skip_unknown: bool = False,
) -> dict[str, Variant]:
    """Load the bridges that `none,NAME,NAME=DIR,NAME+NAME,…` names.

    Args:
        spec: NAME is a registered bridge, or an enabled plugin with `post_adapter_feat`. DIR is a folder or
            hf:USER/NAME[@REVISION]; a folder with `seed-*` folders gives one variant for each. Bridges joined by "+" are
            applied one after the other.
        plugins: The plugin manager.
        folder: DIR for names without one of their own.
        check: Called as check(bridge, name) for each bridge, those of a chain too; raises where it does not fit the run.
        device: Where the bridges go.
        settings: Applied to every bridge that has them; NAME.KEY to the bridge of that name alone.
        sweep: Every bridge is also taken at each point of what this has of its settings.
        skip_unknown: Leave out settings that no bridge has. `Source.settings` has those that were applied.

    Returns:
        Variants by name, without `none`.

    Raises:
        EzhoiDiffusionError: A name is unknown or comes twice, there is none, or no bridge has a setting.
    """
    settings, sweep = settings or {}, sweep or {}
    bridges = known_bridges(plugins).names()
    functions = [name for name in plugins.implementing("post_adapter_feat") if name not in bridges]
    variants: dict[str, Variant] = {}
    for item, named in parse_bridges(spec, [*bridges, *functions]).items():
        for one in named:
            if one.name not in bridges and (one.folder or one.name not in functions):
                raise EzhoiDiffusionError(
                    f"there is no bridge '{one.name}'. Known bridges: {', '.join([REFERENCE, *bridges])}; in a run of EZ-HOI "
                    f"also plugins with post_adapter_feat that --plugin enables. `ezhoi-diffusion plugins` lists what is installed"
                )
        if len(named) == 1 and named[0].name in functions:
            variants[item] = Variant(item, PluginBridge(plugins, named[0].name))
            continue
        for variant in _loaded(item, named, folder, plugins, settings, sweep, check):
            variant.bridge.to(device)
            variants[variant.name] = variant
    if not variants:
        raise EzhoiDiffusionError(
            "only `none` is named; name a bridge beside it, e.g. none,diffusion with --bridge DIR"
        )
    _require_known({*(() if skip_unknown else settings), *sweep}, variants)
    return variants


def _loaded(
    item: str,
    named: Sequence[Named],
    default_folder: str,
    plugins: PluginManager,
    settings: Mapping[str, Any],
    sweep: Mapping[str, Sequence[Any]],
    check: Callable[[Bridge, str], None],
) -> Iterator[Variant]:
    """The variants of one item: its seeds, each as it is and at every point of the sweep."""
    bridges = known_bridges(plugins).names()
    for seed, paths in _seeds(item, [one.folder or default_folder for one in named]):
        members = {
            one.name: load_bridge(plugins, one.name, path) if one.name in bridges else PluginBridge(plugins, one.name)
            for one, path in zip(named, paths, strict=True)
        }
        bridge = ChainBridge(members) if len(members) > 1 else members[named[0].name]
        # not those of a folder that a member was given although it learns nothing
        has_seeds = any(
            member.seeded and path is not None and path.name == seed
            for member, path in zip(members.values(), paths, strict=True)
        )
        label = f"{item}/{seed}" if has_seeds else item
        chosen = _own(named, bridge, settings)
        if chosen:
            bridge = _overridden(bridge, label, chosen)
        for one, its_name in with_members(bridge, label):
            check(one, its_name)
        for point, applied in _points(bridge, label, _own(named, bridge, sweep)):
            suffix = f"[{','.join(f'{key}={value}' for key, value in point.items())}]" if point else ""
            group = item + suffix if label != item else None
            source = Source(named[0].name, paths[0], {**chosen, **point}) if len(named) == 1 else None
            yield Variant(label + suffix, applied, group, source)
        if not has_seeds:
            return


def _own(named: Sequence[Named], bridge: Bridge, values: Mapping[str, Any]) -> dict[str, Any]:
    """What `values` has of the settings of a bridge; those of a chain keep their names."""
    if len(named) == 1:
        return own_settings(named[0].name, bridge, values)
    return {key: value for key, value in values.items() if key in bridge.settings}


def _points(bridge: Bridge, label: str, sweep: Mapping[str, Sequence[Any]]) -> list[tuple[dict[str, Any], Bridge]]:
    """The bridge as it is, and at every point of a sweep of its settings. All are of one sweep, so they share what they can."""
    if not sweep:
        return [({}, bridge)]
    points = [{}, *(dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values()))]
    with _naming(label):
        return list(zip(points, bridge.sweep(points), strict=True))


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


def seed_folders(where: str) -> list[tuple[str, Path]]:
    """(name, folder) of every seed of the training in a folder, or the folder itself with the name "".

    Raises:
        EzhoiDiffusionError: What should be the folder of a seed is something else.
    """
    path = resolve_path(where)
    seeds = sorted(path.glob(f"{SEED_PREFIX}*"), key=lambda seed: (len(seed.name), seed.name))
    if not seeds or current(path, CONFIG).exists():
        return [("", path)]
    for seed in seeds:
        if not seed.is_dir():
            raise EzhoiDiffusionError(f"{seed} is not the folder of a seed: remove it, or copy the training again")
    return [(seed.name, seed) for seed in seeds]


def _seeds(item: str, folders: Sequence[str]) -> list[tuple[str, list[Path | None]]]:
    """(name of the seed, folder of each bridge) for every seed of the trainings in `folders`; without seeds, one with ""."""
    found: list[dict[str, Path | None]] = [dict(seed_folders(where)) if where else {"": None} for where in folders]
    several = [list(seeds) for seeds in found if "" not in seeds]
    if any(names != several[0] for names in several):
        raise EzhoiDiffusionError(f"'{item}' chains bridges of different seeds: name a seed's own folder for each")
    return [(name, [seeds.get(name, seeds.get("")) for seeds in found]) for name in (several[0] if several else [""])]


def _require_known(names: set[str], variants: Mapping[str, Variant]) -> None:
    known = {setting for variant in variants.values() for setting in variant.bridge.settings}
    sources = [variant.source.name for variant in variants.values() if variant.source is not None]
    named = {f"{source}.{setting}" for source in sources for setting in known}
    unknown = sorted(names - known - named)
    if unknown:
        raise EzhoiDiffusionError(
            f"none of {', '.join(variants)} has a setting {', '.join(unknown)}; they have "
            f"{', '.join(sorted(known)) or 'none'}"
        )

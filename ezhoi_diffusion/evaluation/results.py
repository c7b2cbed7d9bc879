"""The JSON form of a comparison, as a type: what `Comparison.to_dict` gives and report.json holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from typing_extensions import TypedDict

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.comparison import FULL
from ezhoi_diffusion.features.contents import PARTITIONS
from ezhoi_diffusion.files import read_json
from ezhoi_diffusion.schema import Count, Share

# of a difference: key, lowest and highest value; an interval may leave -100 to 100
RANGES = (("low", -1e3, 1e3), ("high", -1e3, 1e3), ("p", 0, 1), ("p_adjusted", 0, 1))


class DifferenceEntry(TypedDict):
    """A difference in mean AP, in points: its interval and p-values."""

    low: float
    high: float
    p: float
    p_adjusted: float


class BootstrapEntry(TypedDict):
    """Intervals: base -> group -> difference."""

    over: dict[str, dict[str, DifferenceEntry]]


class VariantEntry(TypedDict):
    """One bridge. The values of a group without annotations are NaN."""

    name: str
    baseline: bool
    seed_group: str | None
    mean_ap: dict[str, float]
    difference: dict[str, float] | None
    bootstrap: BootstrapEntry | None
    provenance: dict[str, Any] | None


class SeedGroupEntry(TypedDict):
    """The seeds of one training together."""

    variants: Annotated[list[str], msgspec.Meta(min_length=1)]
    difference: dict[str, float]
    bootstrap: BootstrapEntry | None


class BootstrapSettings(TypedDict):
    """How intervals were made."""

    replicates: Count
    level: Share


class ComparisonFile(TypedDict):
    """report.json, as far as it is read again. The first variant is bare EZ-HOI."""

    variants: Annotated[list[VariantEntry], msgspec.Meta(min_length=1)]
    seed_groups: dict[str, SeedGroupEntry]
    classes: dict[str, list[Count]]
    algorithm: str
    setting: str
    bootstrap: BootstrapSettings | None
    images: Count
    pairs: Count
    forced: list[str]
    degraded: dict[str, str]
    caveats: list[str]
    primary: str | None


def read_comparison(path: Path, error: type[EzhoiDiffusionError], remedy: str) -> dict[str, Any]:
    """Read report.json. Raises `error` where it is missing, changed, or not one of a comparison."""
    content = read_json(path, ComparisonFile, error, remedy)
    problem = next(_problems(content), None)
    if problem:
        raise error(f"{path} is not the report of a comparison: {problem}; {remedy}")
    return content


def _problems(content: dict[str, Any]) -> Iterator[str]:
    """What contradicts the rest, lacks a group of classes that the others have, or is no number of its kind."""
    classes = {group: set(index) for group, index in content["classes"].items()}
    for parts in PARTITIONS:
        if classes.keys() >= {*parts} and set.union(*(classes[part] for part in parts)) != classes.get(FULL):
            yield f"classes {' and '.join(parts)} do not make up {FULL}"
    groups = content["variants"][0]["mean_ap"].keys()
    tables: list[tuple[str, Mapping[str, float], float]] = []
    for number, one in enumerate(content["variants"]):
        tables.append((f"variants[{number}].mean_ap", one["mean_ap"], 0.0))
        if number:
            tables.append((f"variants[{number}].difference", one["difference"] or {}, -100.0))
    for name, one in content["seed_groups"].items():
        tables.append((f"seed_groups[{name}].difference", one["difference"], -100.0))
    if classes.keys() != groups:
        yield f"there are classes of {', '.join(classes) or 'no group'} instead of {', '.join(groups)}"
    for name, values, low in tables:
        if values.keys() != groups:
            yield f"{name} has {', '.join(values) or 'no group'} instead of {', '.join(groups)}"
        yield from (f"{name} has {value:g}" for value in values.values() if not _is_within(value, low, 100))
    for entry in (*content["variants"], *content["seed_groups"].values()):
        for differences in (entry["bootstrap"] or {"over": {}})["over"].values():
            for found in differences.values():
                yield from (
                    f"{key} is {found[key]:g}" for key, low, high in RANGES if not _is_within(found[key], low, high)
                )


def _is_within(value: float, low: float, high: float) -> bool:
    """Whether a value lies in a range, or is NaN: nothing was measured."""
    return math.isnan(value) or low <= value <= high

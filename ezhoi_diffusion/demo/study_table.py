"""What several runs say together: mean changes of mAP with intervals, and the tables of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.comparison import REFERENCE
from ezhoi_diffusion.evaluation.results import read_comparison
from ezhoi_diffusion.files import write_atomic, write_json

GROUPS = ("full", "unseen", "seen")
LEVEL = 0.95
CONTRASTS = [("scored", "residual")]  # trained on the same data with the same loss: does diffusion add anything?
EXPLANATION = f"""\
Changes are points of mAP over EZ-HOI alone, on test images that nothing was chosen on; a mean is over all runs. **Runs**: the
interval takes each run as one observation. **Worlds**: it takes each world's mean over its splits as one, because the runs of
a world share images and towers; that is the more careful of the two. Both are mean ± t · s / √n with Student's t at n − 1
degrees of freedom. Each world has images of its own, so s contains the choice of images as well. To resample
images inside resampled runs would count them twice (Davison & Hinkley 1997, section 3.8). The splits are conditions, not a
sample. **Over the best control**: against the baseline with the highest mAP in that run and that group, EZ-HOI alone
included. A star: the interval over a single run's images excludes zero. All intervals are {LEVEL:.0%} ones, and not adjusted for the number
of bridges."""


@dataclass(frozen=True)
class Variant:
    """One bridge in one run.

    Attributes:
        mean_ap: Group -> mAP in percent.
        images: Group -> interval of the difference to EZ-HOI alone, over the run's images; empty for EZ-HOI alone.
        control: Whether it is there to be beaten.
    """

    mean_ap: Mapping[str, float]
    images: Mapping[str, tuple[float, float]]
    control: bool


@dataclass(frozen=True)
class Run:
    """One world in one split: its bridges by name."""

    seed: int
    split: str
    variants: Mapping[str, Variant]

    def change(self, name: str, group: str) -> float:
        """Points of mAP over EZ-HOI alone."""
        return self.variants[name].mean_ap[group] - self.variants[REFERENCE].mean_ap[group]

    def over_controls(self, name: str, group: str) -> float:
        """Points of mAP over the best of the other controls and EZ-HOI alone."""
        best = max(
            v.mean_ap[group]
            for other, v in self.variants.items()
            if other == REFERENCE or (v.control and other != name)
        )
        return self.variants[name].mean_ap[group] - best


@dataclass(frozen=True)
class Estimate:
    """A mean over runs, with its intervals; None where there is one run, or one world.

    Attributes:
        runs: Interval with each run as an observation.
        worlds: Interval with each world's mean as an observation.
        positive: Number of runs above zero.
    """

    mean: float
    runs: tuple[float, float] | None
    worlds: tuple[float, float] | None
    positive: int


def read_run(report: Path, seed: int, split: str, names: Mapping[str, str]) -> Run:
    """Read what `compare` wrote. names: what the report calls a bridge -> its name in the study."""
    content = read_comparison(report, EzhoiDiffusionError, "delete the folder and run the study again")
    variants = {}
    for one in content["variants"]:
        found = (one["bootstrap"] or {}).get("over", {}).get(REFERENCE, {})
        images = {group: (interval["low"], interval["high"]) for group, interval in found.items()}
        variants[names.get(one["name"], one["name"])] = Variant(one["mean_ap"], images, one["baseline"])
    return Run(seed, split, variants)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval for the mean of independent observations; None for fewer than two."""
    from scipy.stats import t  # slow to import

    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * math.sqrt(variance / count)
    return mean - half, mean + half


def estimate(seeds: Sequence[int], values: Sequence[float]) -> Estimate:
    """Summarize one value for each run. seeds: the world of each run."""
    worlds: dict[int, list[float]] = {}
    for seed, value in zip(seeds, values, strict=True):
        worlds.setdefault(seed, []).append(value)
    means = [math.fsum(own) / len(own) for own in worlds.values()]
    mean, positive = math.fsum(values) / len(values), sum(value > 0 for value in values)
    return Estimate(mean, t_interval(values), t_interval(means), positive)


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """The content of study.json: every bridge's estimates, and every run."""
    seeds = [run.seed for run in runs]
    names = [name for name in runs[0].variants if name != REFERENCE]
    return {
        "level": LEVEL,
        "bridges": {
            name: {
                "control": all(run.variants[name].control for run in runs),  # `tuned` may choose one in some runs
                "change": {
                    group: asdict(estimate(seeds, [run.change(name, group) for run in runs])) for group in GROUPS
                },
                "over_best_control": {
                    group: asdict(estimate(seeds, [run.over_controls(name, group) for run in runs])) for group in GROUPS
                },
            }
            for name in names
        },
        "contrasts": {
            f"{one} less {other}": {
                group: asdict(estimate(seeds, [run.change(one, group) - run.change(other, group) for run in runs]))
                for group in GROUPS
            }
            for one, other in CONTRASTS
            if {one, other} <= set(names)
        },
        "runs": [asdict(run) for run in runs],
    }


def write_tables(out: Path, summary: Mapping[str, Any]) -> None:
    """Write study.json and study.md."""
    write_json(out / "study.json", dict(summary))
    write_atomic(out / "study.md", markdown(summary).encode())


def markdown(summary: Mapping[str, Any]) -> str:
    """The tables, losses as plainly as gains."""
    runs = summary["runs"]
    worlds = len({run["seed"] for run in runs})
    lines = [f"# Do bridges help? {len(runs)} runs in {worlds} worlds", "", EXPLANATION, ""]
    for key, title in (("change", "Change over EZ-HOI alone"), ("over_best_control", "Change over the best control")):
        found = {name + (" (control)" if one["control"] else ""): one[key] for name, one in summary["bridges"].items()}
        lines += [f"## {title}", "", *_summary_table(found, len(runs)), ""]
    if summary["contrasts"]:
        lines += ["## One bridge against another", "", *_summary_table(summary["contrasts"], len(runs)), ""]
    for group in GROUPS:
        lines += [f"## Each run: {group}", "", *_run_table(runs, list(summary["bridges"]), group), ""]
    return "\n".join(lines)


def _summary_table(found: Mapping[str, Any], count: int) -> list[str]:
    head = ["bridge", *(f"{group}: mean, runs, worlds, gains" for group in GROUPS)]
    rows = []
    for name, of_group in found.items():
        cells = []
        for group in GROUPS:
            one = of_group[group]
            intervals = " ".join(_interval(one[unit]) for unit in ("runs", "worlds"))
            cells.append(f"{one['mean']:+.2f} {intervals} {one['positive']}/{count}")
        rows.append([name, *cells])
    return _table(head, rows)


def _run_table(runs: Sequence[Mapping[str, Any]], names: Sequence[str], group: str) -> list[str]:
    """Changes in every run; a star where the interval over the run's own images excludes zero."""
    rows = []
    for run in runs:
        bare = run["variants"][REFERENCE]["mean_ap"][group]
        cells = [f"{run['seed']} {run['split']}", f"{bare:.2f}"]
        for name in names:
            one = run["variants"][name]
            low, high = one["images"].get(group, (-math.inf, math.inf))
            cells.append(f"{one['mean_ap'][group] - bare:+.2f}{'' if low <= 0 <= high else '*'}")
        rows.append(cells)
    return _table(["run", "EZ-HOI", *names], rows)


def _interval(bounds: Sequence[float] | None) -> str:
    return "[–]" if bounds is None else f"[{bounds[0]:+.2f} {bounds[1]:+.2f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]

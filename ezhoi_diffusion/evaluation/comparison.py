"""The result of a comparison: what each variant is worth, and its difference to bare EZ-HOI."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ezhoi_diffusion.evaluation.average_precision import Algorithm, Scored, average_precision
from ezhoi_diffusion.evaluation.bootstrap import LEVEL, REFERENCE, BootstrapResult, Difference, paired_bootstrap

if TYPE_CHECKING:
    from ezhoi_diffusion.evaluation.variants import Variant

__all__ = ["FULL", "REFERENCE", "Comparison", "VariantResult", "p_text", "versions"]
FULL = "full"  # the group of all classes, which every comparison has
PRIMARY = "tuned"  # the bridge whose full mAP is the declared question, where it is compared
SWEEP_CAVEAT = "Settings were swept on the test split: the best of several is better here than on new images."
SWEPT = re.compile(r"\[[^\[\]]+=[^\[\]]*\]$")  # how the name of a point of a sweep ends


def p_text(p: float) -> str:
    """A p-value with as many digits as a thousand replicates justify."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


@dataclass(frozen=True, eq=False)
class VariantResult:
    """Results of one variant.

    Attributes:
        name: What tables call it.
        ap: AP of each of K classes, [K] float64 in 0..1.
        added_ms: Mean milliseconds that it adds to an image.
        baseline: Whether it is there to be beaten.
        seed_group: Its name without its seed, where a training has several seeds.
        protocol: What the bridge learned from, as `Bridge.protocol` says.
        provenance: Where the bridge comes from and how it is applied, as JSON.
        alignment: Measure -> value, as in `evaluation.alignment`; empty where nothing was measured.
        sample: Its features [R, D] of some pairs drawn at random, the same pairs for every variant; None where none are kept.
        bootstrap: Intervals and p-values; None where there are none. One seed of several has none of its own.
    """

    name: str
    ap: Tensor
    added_ms: float = 0.0
    baseline: bool = False
    seed_group: str | None = None
    protocol: str = "inductive"
    provenance: dict[str, Any] | None = None
    alignment: Mapping[str, float | None] = field(default_factory=dict)
    sample: Tensor | None = None
    bootstrap: BootstrapResult | None = None


@dataclass
class Comparison:
    """Results of all variants on the same pairs.

    A bridge is what anything is claimed about: a variant, or all seeds of one training (`bridges`).

    Attributes:
        variants: Every variant by name; the first is `none`.
        groups: Group -> classes [k] whose mean AP is reported. `full` is always there.
        images: Number of images.
        pairs: Number of human-object pairs.
        annotations: Annotated pairs of each class, [K].
        fingerprint: Of the run, as JSON.
        names: What each class is called, where EZ-HOI says it.
        ezhoi_ms: Mean milliseconds of EZ-HOI's own forward pass on an image; None where EZ-HOI did not run.
        algorithm: Of average precision.
        setting: `default` or `known-object`.
        replicates: Of the bootstrap; 0 without intervals.
        seed_bootstrap: Bridge with several seeds -> its intervals and p-values.
        level: Of the intervals.
        forced: Fingerprint checks that were forced.
        degraded: Plugins that were switched off, with the reason.
        sample_text: The text features [N_sel, D], beside the variants' samples.
        caveats: Why these figures are no result to report.
        headroom: What is perfect -> group -> mean AP in percent, as in `evaluation.headroom`.
        calibration: Variant -> one entry for each object, as in `evaluation.calibration`.
    """

    variants: dict[str, VariantResult]
    groups: dict[str, Tensor]
    images: int
    pairs: int
    annotations: Tensor
    fingerprint: dict[str, Any]
    names: list[str] | None = None
    ezhoi_ms: float | None = None
    algorithm: Algorithm = "11P"
    setting: str = "default"
    replicates: int = 0
    seed_bootstrap: dict[str, BootstrapResult] = field(default_factory=dict)
    level: float = LEVEL
    forced: list[str] = field(default_factory=list)
    degraded: dict[str, str] = field(default_factory=dict)
    sample_text: Tensor | None = None
    caveats: list[str] = field(default_factory=list)
    headroom: dict[str, dict[str, float]] = field(default_factory=dict)
    calibration: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def from_detections(
        cls,
        detections: Mapping[str, Scored],
        annotations: Tensor,
        groups: dict[str, Tensor],
        variants: Mapping[str, Variant],
        *,
        added_ms: Mapping[str, float],
        num_gt: Tensor | None = None,
        alignment: Mapping[str, Mapping[str, float | None]] | None = None,
        samples: Mapping[str, Tensor] | None = None,
        measure: Callable[[Scored, Tensor, Algorithm], Tensor] | None = None,
        algorithm: Algorithm = "11P",
        replicates: int = 0,
        jobs: int = 1,
        advance: Callable[[], object] | None = None,
        **facts: Any,
    ) -> Comparison:
        """Score the detections of all variants: the one place where a comparison is made, live and offline.

        Args:
            detections: Variant -> its scored detections; the first is `none`.
            annotations: Annotated pairs of each image and class, [I, K] int32 or int64.
            groups: Group -> classes [k].
            variants: The variants but `none`.
            added_ms: Variant -> mean milliseconds that it adds to an image.
            num_gt: Annotated pairs of each class [K], where they are not the sum of `annotations`.
            alignment: Variant -> measure -> value.
            samples: Variant -> its features [R, D] of the sampled pairs.
            measure: AP of each class [K] from detections, counts of annotations [K] and algorithm; `average_precision` by default.
            algorithm: Of average precision.
            replicates: Of the bootstrap over images; 0 for none.
            jobs: As for `paired_bootstrap`.
            advance: As for `paired_bootstrap`.
            facts: The other attributes.
        """
        own_counts = num_gt is not None
        num_gt = annotations.sum(0) if num_gt is None else num_gt
        seeds: dict[str, list[str]] = {}
        for name, one in variants.items():
            if one.seed_group is not None:
                seeds.setdefault(one.seed_group, []).append(name)
        bootstrap: dict[str, BootstrapResult] = {}
        ap: dict[str, Tensor] = {}
        if replicates:
            baselines = dict.fromkeys(v.seed_group or name for name, v in variants.items() if v.bridge.baseline)
            bootstrap = paired_bootstrap(
                detections, annotations, groups, baselines=[*baselines], seed_groups=seeds, algorithm=algorithm,
                replicates=replicates, jobs=jobs, advance=advance,
            )  # fmt: skip
            for result in bootstrap.values():
                ap |= result.ap
        if measure is not None or own_counts or not replicates:
            measure = measure or average_precision
            ap = {name: measure(scored, num_gt, algorithm) for name, scored in detections.items()}
        results = {}
        for name in detections:
            variant = variants.get(name)
            results[name] = VariantResult(
                name,
                ap[name],
                added_ms=added_ms.get(name, 0.0),
                baseline=variant is not None and variant.bridge.baseline,
                seed_group=variant.seed_group if variant is not None else None,
                protocol=variant.bridge.protocol if variant is not None else "inductive",
                provenance=variant.bridge.provenance if variant is not None else None,
                alignment=(alignment or {}).get(name, {}),
                sample=(samples or {}).get(name),
                bootstrap=bootstrap.get(name),
            )
        return cls(
            results, groups, annotations=num_gt, algorithm=algorithm, replicates=replicates, images=len(annotations),
            seed_bootstrap={name: bootstrap[name] for name in seeds if name in bootstrap}, **facts,
        )  # fmt: skip

    @property
    def seed_groups(self) -> dict[str, list[str]]:
        """Name of a bridge that was trained with several seeds -> names of its variants."""
        groups: dict[str, list[str]] = {}
        for name, variant in self.variants.items():
            if variant.seed_group is not None:
                groups.setdefault(variant.seed_group, []).append(name)
        return groups

    @property
    def bridges(self) -> dict[str, VariantResult]:
        """What is compared, `none` first: each variant, or all seeds of a training as one result, their mean.

        The sample of such a result is that of the first seed.
        """
        found: dict[str, VariantResult] = {}
        seed_groups = self.seed_groups
        for name, result in self.variants.items():
            if result.seed_group is None:
                found[name] = result
            elif result.seed_group not in found:
                found[result.seed_group] = self._over_seeds(result.seed_group, seed_groups[result.seed_group])
        return found

    def _over_seeds(self, name: str, seeds: list[str]) -> VariantResult:
        results = [self.variants[seed] for seed in seeds]
        measures: dict[str, float | None] = {}
        for measure in results[0].alignment:
            values = [value for one in results if (value := one.alignment[measure]) is not None]
            measures[measure] = fmean(values) if values else None
        return replace(
            results[0],
            name=name,
            ap=torch.stack([one.ap for one in results]).mean(0) if len(results) > 1 else results[0].ap,
            added_ms=fmean(one.added_ms for one in results),
            provenance=None,
            alignment=measures,
            bootstrap=self.seed_bootstrap.get(name),
        )

    def mean_ap(self, name: str, group: str) -> float:
        """Mean AP of a group of classes in percent, of a variant or over the seeds of a bridge."""
        index = self.groups[group]
        return fmean(float(self.variants[v].ap[index].mean()) * 100 for v in self.seed_groups.get(name, [name]))

    def difference(self, name: str, group: str, over: str = REFERENCE) -> float:
        """Percentage points of mean AP over bare EZ-HOI, or over a baseline."""
        return self.mean_ap(name, group) - self.mean_ap(over, group)

    @property
    def baselines(self) -> list[str]:
        """Bridges that are there to be beaten, the highest full mean AP first."""
        bridges = self.bridges
        return [name for name in self.ranked() if bridges[name].baseline]

    @property
    def primary(self) -> str | None:
        """The bridge whose full mAP is the declared question: the tuned one, chosen before these images were seen."""
        found = [name for name in self.bridges if name.partition("=")[0] == PRIMARY]
        return found[0] if len(found) == 1 else None

    @property
    def swept(self) -> list[str]:
        """Bridges that are points of a sweep."""
        return [name for name in self.bridges if SWEPT.search(name)]

    def sweep_caveat(self) -> list[str]:
        """What to say where settings were swept on the images that test them; empty otherwise."""
        return [SWEEP_CAVEAT] if self.swept else []

    def found(self, name: str, group: str, over: str = REFERENCE) -> Difference | None:
        """The difference of a bridge to bare EZ-HOI, or to a baseline; None without intervals."""
        bootstrap = self.bridges[name].bootstrap if name in self.bridges else None
        return None if bootstrap is None else bootstrap.over[over][group]

    def is_primary(self, name: str, group: str) -> bool:
        """Whether a result is the declared question, whose p-value needs no adjustment for the others."""
        return name == self.primary and group == FULL

    def p(self, name: str, group: str, over: str = REFERENCE) -> float | None:
        """The p-value that counts: adjusted for all bridges, save for the primary endpoint."""
        found = self.found(name, group, over)
        if found is None:
            return None
        return found.p if self.is_primary(name, group) else found.p_adjusted

    def bounds(self, name: str, group: str, over: str = REFERENCE) -> tuple[float, float] | None:
        """The interval of a difference to show: simultaneous for all bridges if settings were swept, else its own."""
        found = self.found(name, group, over)
        if found is None:
            return None
        return (found.joint_low, found.joint_high) if self.swept else (found.low, found.high)

    def is_significant(self, name: str, group: str, over: str = REFERENCE) -> bool:
        """Whether the difference to bare EZ-HOI, or to a baseline, is more than chance.

        The interval excludes 0, and the p-value that counts is below 1 − level. One seed of several is never significant.
        """
        bounds, p = self.bounds(name, group, over), self.p(name, group, over)
        return bounds is not None and p is not None and p < 1 - self.level and not bounds[0] <= 0 <= bounds[1]

    def spread(self, seed_group: str, group: str) -> tuple[float, float | None]:
        """Mean over seeds of mean AP in percent, and its standard deviation (n − 1); None for one seed."""
        values = torch.tensor([self.mean_ap(v, group) for v in self.seed_groups[seed_group]], dtype=torch.float64)
        return float(values.mean()), float(values.std()) if len(values) > 1 else None

    def ranked(self) -> list[str]:
        """All bridges but `none`, the highest full mean AP first."""
        return sorted((b for b in self.bridges if b != REFERENCE), key=lambda b: self.mean_ap(b, FULL), reverse=True)

    def warnings(self) -> list[str]:
        """Warnings that come before any number."""
        return [
            *self.caveats,
            *(f"FORCED: {message}" for message in self.forced),
            *(f"DEGRADED: {message}" for message in self.degraded.values()),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, AP in percent. It has no date, so equal results give equal files."""
        return {
            "variants": [self._variant(result) for result in self.variants.values()],
            "seed_groups": {name: self._seed_group(name) for name in self.seed_groups},
            "classes": {group: index.tolist() for group, index in self.groups.items()},
            "names": self.names,
            "annotations": self.annotations.tolist(),
            "algorithm": self.algorithm,
            "setting": self.setting,
            "bootstrap": {"replicates": self.replicates, "level": self.level} if self.replicates else None,
            "images": self.images,
            "pairs": self.pairs,
            "ezhoi_ms_per_image": self.ezhoi_ms,
            "fingerprint": self.fingerprint,
            "forced": self.forced,
            "degraded": self.degraded,
            "caveats": self.caveats,
            "primary": self.primary,
            "headroom": self.headroom,
            "calibration": self.calibration,
            "versions": versions(),
        }

    def _variant(self, result: VariantResult) -> dict[str, Any]:
        name = result.name
        return {
            "name": name,
            "baseline": result.baseline,
            "seed_group": result.seed_group,
            "protocol": result.protocol,
            "mean_ap": {group: self.mean_ap(name, group) for group in self.groups},
            "difference": None if name == REFERENCE else {g: self.difference(name, g) for g in self.groups},
            "bootstrap": None if result.bootstrap is None else result.bootstrap.to_dict(),
            "per_class_ap": (result.ap * 100).tolist(),
            "alignment": dict(result.alignment),
            "added_ms_per_image": result.added_ms,
            "provenance": result.provenance,
        }

    def _seed_group(self, name: str) -> dict[str, Any]:
        spreads = {group: self.spread(name, group) for group in self.groups}
        bootstrap = self.seed_bootstrap.get(name)
        return {
            "variants": self.seed_groups[name],
            "mean_ap": {group: {"mean": mean, "standard_deviation": sd} for group, (mean, sd) in spreads.items()},
            "difference": {group: self.difference(name, group) for group in self.groups},
            "bootstrap": None if bootstrap is None else bootstrap.to_dict(),
        }

    def table(self) -> str:
        """The results as plain text: mean AP, differences, intervals, and what they mean."""
        from ezhoi_diffusion.evaluation.table import as_text

        return as_text(self)


def versions() -> dict[str, str]:
    """The software that computed the results."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ezhoi-diffusion": version("ezhoi-diffusion"),
    }

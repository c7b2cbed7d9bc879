"""The result of a comparison: what each variant is worth, and its difference to bare EZ-HOI."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ezhoi_diffusion.evaluation.average_precision import Algorithm, Scored, average_precision
from ezhoi_diffusion.evaluation.bootstrap import LEVEL, REFERENCE, BootstrapResult, paired_bootstrap

if TYPE_CHECKING:
    from ezhoi_diffusion.evaluation.variants import Variant

__all__ = ["FULL", "REFERENCE", "Comparison", "VariantResult", "p_text", "versions"]
FULL = "full"  # the group of all classes, which every comparison has


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
        provenance: Where the bridge comes from and how it is applied, as JSON.
        alignment: Measure -> value, as in `evaluation.alignment`; empty where nothing was measured.
        sample: Its features [R, D] of some pairs drawn at random, the same pairs for every variant; None where none are kept.
        bootstrap: Intervals and p-values; None where there are none.
    """

    name: str
    ap: Tensor
    added_ms: float = 0.0
    baseline: bool = False
    seed_group: str | None = None
    provenance: dict[str, Any] | None = None
    alignment: Mapping[str, float | None] = field(default_factory=dict)
    sample: Tensor | None = None
    bootstrap: BootstrapResult | None = None


@dataclass
class Comparison:
    """Results of all variants on the same pairs.

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
        replicates: Of the bootstrap over images; 0 without intervals.
        level: Of the intervals.
        forced: Fingerprint checks that were forced.
        degraded: Plugins that were switched off, with the reason.
        sample_text: The text features [N_sel, D], beside the variants' samples.
        caveats: Why these figures are no result to report.
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
    level: float = LEVEL
    forced: list[str] = field(default_factory=list)
    degraded: dict[str, str] = field(default_factory=dict)
    sample_text: Tensor | None = None
    caveats: list[str] = field(default_factory=list)

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
        measure: Callable[[Scored, Tensor, Algorithm], Tensor] = average_precision,
        algorithm: Algorithm = "11P",
        replicates: int = 0,
        **facts: Any,
    ) -> Comparison:
        """Score the detections of all variants: the one place where a comparison is made, live and offline.

        Args:
            detections: Variant -> its scored detections; the first is `none`.
            annotations: Annotated pairs of each image and class, [I, K] int64.
            groups: Group -> classes [k].
            variants: The variants but `none`.
            added_ms: Variant -> mean milliseconds that it adds to an image.
            num_gt: Annotated pairs of each class [K], where they are not the sum of `annotations`.
            alignment: Variant -> measure -> value.
            samples: Variant -> its features [R, D] of the sampled pairs.
            measure: AP of each class [K] from detections, counts of annotations [K] and algorithm.
            algorithm: Of average precision.
            replicates: Of the bootstrap over images; 0 for none.
            facts: The other attributes.
        """
        num_gt = annotations.sum(0) if num_gt is None else num_gt
        bootstrap: Mapping[str, BootstrapResult] = {}
        if replicates:
            baselines = [name for name, variant in variants.items() if variant.bridge.baseline]
            bootstrap = paired_bootstrap(
                detections, annotations, groups, baselines=baselines, algorithm=algorithm, replicates=replicates
            )
        results = {}
        for name, scored in detections.items():
            variant = variants.get(name)
            results[name] = VariantResult(
                name,
                measure(scored, num_gt, algorithm),
                added_ms=added_ms.get(name, 0.0),
                baseline=variant is not None and variant.bridge.baseline,
                seed_group=variant.seed_group if variant is not None else None,
                provenance=variant.bridge.provenance if variant is not None else None,
                alignment=(alignment or {}).get(name, {}),
                sample=(samples or {}).get(name),
                bootstrap=bootstrap.get(name),
            )
        return cls(
            results, groups, annotations=num_gt, algorithm=algorithm, replicates=replicates, images=len(annotations), **facts
        )  # fmt: skip

    def mean_ap(self, variant: str, group: str) -> float:
        """Mean AP of a group of classes, in percent."""
        return float(self.variants[variant].ap[self.groups[group]].mean()) * 100

    def difference(self, variant: str, group: str) -> float:
        """Percentage points of mean AP over bare EZ-HOI."""
        return self.mean_ap(variant, group) - self.mean_ap(REFERENCE, group)

    def is_significant(self, variant: str, group: str, over: str = REFERENCE) -> bool:
        """Whether the difference to bare EZ-HOI, or to a baseline, is more than chance.

        The interval excludes 0, and the p-value adjusted for all variants is below 1 − level.
        """
        bootstrap = self.variants[variant].bootstrap
        if bootstrap is None:
            return False
        found = bootstrap.over[over][group]
        return found.p_adjusted < 1 - self.level and not found.low <= 0 <= found.high

    @property
    def seed_groups(self) -> dict[str, list[str]]:
        """Name of a bridge that was trained with several seeds -> names of its variants."""
        groups: dict[str, list[str]] = {}
        for name, variant in self.variants.items():
            if variant.seed_group is not None:
                groups.setdefault(variant.seed_group, []).append(name)
        return groups

    def spread(self, seed_group: str, group: str) -> tuple[float, float | None]:
        """Mean over seeds of mean AP in percent, and its standard deviation (n − 1); None for one seed."""
        values = torch.tensor([self.mean_ap(v, group) for v in self.seed_groups[seed_group]], dtype=torch.float64)
        return float(values.mean()), float(values.std()) if len(values) > 1 else None

    def ranked(self) -> list[str]:
        """All variants but `none`, the highest full mean AP first."""
        return sorted((v for v in self.variants if v != REFERENCE), key=lambda v: self.mean_ap(v, FULL), reverse=True)

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
            "versions": versions(),
        }

    def _variant(self, result: VariantResult) -> dict[str, Any]:
        name = result.name
        return {
            "name": name,
            "baseline": result.baseline,
            "seed_group": result.seed_group,
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
        return {
            "variants": self.seed_groups[name],
            "mean_ap": {group: {"mean": mean, "standard_deviation": sd} for group, (mean, sd) in spreads.items()},
        }

    def table(self) -> str:
        """The results as plain text: mean AP, differences, intervals, warnings."""
        names = list(self.variants)
        head = ["mAP", *self.groups, "ms/image"]
        rows = [[v, *(f"{self.mean_ap(v, g):.2f}" for g in self.groups), self._ms(v)] for v in names]
        rows += [
            [
                f"{v} - {REFERENCE}",
                *(f"{self.difference(v, g):+.2f}" for g in self.groups),
                f"{self.variants[v].added_ms:+.2f}",
            ]
            for v in names[1:]
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        line = "  ".join("-" * width for width in widths)
        text = [_row(head, widths), line, *(_row(row, widths) for row in rows)]
        text.insert(2 + len(names), line)
        counts = "  ".join(f"{group} {len(index)}" for group, index in self.groups.items())
        text.append(f"{self.images} images, {self.pairs} pairs; classes: {counts}")
        return "\n".join([*text, *self._intervals(), *self.warnings()])

    def _intervals(self) -> list[str]:
        """An interval and a p-value for each difference, and what they do not cover."""
        if not self.replicates:
            return ["One run without intervals: small differences may be chance."]
        rows = [["", *self.groups]]
        for name, result in self.variants.items():
            if name != REFERENCE and result.bootstrap is not None:
                cells = [
                    f"{self.difference(name, g):+.2f} [{d.low:+.2f} {d.high:+.2f}] {p_text(d.p_adjusted)}"
                    for g, d in result.bootstrap.difference.items()
                ]
                rows.append([name, *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            f"difference to {REFERENCE} [{100 * self.level:g} % interval] p, adjusted for all variants:",
            *(_row(row, widths) for row in rows),
            f"Intervals cover the choice of images ({self.replicates} resamplings), not the training seed.",
        ]

    def _ms(self, variant: str) -> str:
        return "-" if self.ezhoi_ms is None else f"{self.ezhoi_ms + self.variants[variant].added_ms:.2f}"


def _row(cells: list[str], widths: list[int]) -> str:
    return "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])


def versions() -> dict[str, str]:
    """The software that computed the results."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ezhoi-diffusion": version("ezhoi-diffusion"),
    }

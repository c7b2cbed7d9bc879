"""One run, many variants of the same pairs: what each is worth, and the difference to the bare host."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.evaluation.average_precision import Algorithm
from ezhoi_diffusion.evaluation.bootstrap import Significance

REFERENCE = "none"
FULL = "full"  # the group of all classes, which every comparison has


def p_text(p: float) -> str:
    """A p-value with as many digits as a thousand replicates are good for."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


@dataclass(frozen=True, eq=False)
class Sample:
    """The same R pairs, drawn at random, as every variant has them, for pictures: rows[variant] and text [N_sel, D]."""

    rows: dict[str, Tensor]
    text: Tensor


@dataclass
class Comparison:
    """Results of a comparison run, of K interaction classes.

    ap: variant -> [K] float64 AP per interaction class, in 0..1; the first variant is `none`.
    groups: group -> interaction classes whose mean AP is reported.
    ezhoi_ms: mean time of the host's own forward pass on an image, None where the host did not run.
    bridge_ms: variant -> mean time it adds to an image.
    names: what each interaction class is called, where the host says so. annotations: [K] annotated pairs of each class.
    significance: intervals and p-values of a paired bootstrap over images. alignment: variant -> measure -> value.
    families: name of a bridge that was trained with several seeds -> its variants. controls: variants that say of
    themselves to be no bridge but what one has to beat. caveats: why these figures are no
    result to report, such as a part of a split.
    """

    ap: dict[str, Tensor]
    groups: dict[str, Tensor]
    images: int
    pairs: int
    ezhoi_ms: float | None
    bridge_ms: dict[str, float]
    fingerprint: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)
    forced: list[str] = field(default_factory=list)
    degraded: dict[str, str] = field(default_factory=dict)
    names: list[str] | None = None
    annotations: Tensor | None = None
    algorithm: Algorithm = "11P"
    setting: str = "default"  # or known-object
    significance: Significance | None = None
    alignment: dict[str, dict[str, float | None]] = field(default_factory=dict)
    seed_groups: dict[str, list[str]] = field(default_factory=dict)
    sample: Sample | None = None
    controls: list[str] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)

    def mean_ap(self, variant: str, group: str) -> float:
        """Mean AP of a group of classes, in percent."""
        return float(self.ap[variant][self.groups[group]].mean()) * 100

    def difference(self, variant: str, group: str) -> float:
        """Percentage points of mean AP over the bare host."""
        return self.mean_ap(variant, group) - self.mean_ap(REFERENCE, group)

    def is_significant(self, variant: str, group: str, over: str = REFERENCE) -> bool:
        """Whether the difference to the bare host, or over a control, can be told from chance: its interval excludes 0, and
        so many variants do not explain it.
        """
        if self.significance is None:
            return False
        differences = self.significance.difference if over == REFERENCE else self.significance.over[over]
        found = differences[variant][group]
        return found.p_adjusted < 1 - self.significance.level and not found.low <= 0 <= found.high

    def spread(self, seed_group: str, group: str) -> tuple[float, float | None]:
        """Mean of a family's mean AP in percent, and its standard deviation over seeds (n - 1); None for one seed."""
        values = torch.tensor([self.mean_ap(v, group) for v in self.seed_groups[seed_group]], dtype=torch.float64)
        return float(values.mean()), float(values.std()) if len(values) > 1 else None

    def ranked(self) -> list[str]:
        """All variants but the reference, the highest full mean AP first."""
        return sorted((v for v in self.ap if v != REFERENCE), key=lambda v: self.mean_ap(v, FULL), reverse=True)

    def warnings(self) -> list[str]:
        """What a reader must know before any figure."""
        return [
            *self.caveats,
            *(f"FORCED: {message}" for message in self.forced),
            *(f"DEGRADED: {message}" for message in self.degraded.values()),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; AP in percent. It has no date, so that the same results give the same."""
        return {
            "mean_ap": {v: {g: self.mean_ap(v, g) for g in self.groups} for v in self.ap},
            "difference": {v: {g: self.difference(v, g) for g in self.groups} for v in self.ap if v != REFERENCE},
            "per_class_ap": {v: (ap * 100).tolist() for v, ap in self.ap.items()},
            "classes": {group: index.tolist() for group, index in self.groups.items()},
            "names": self.names,
            "annotations": None if self.annotations is None else self.annotations.tolist(),
            "algorithm": self.algorithm,
            "setting": self.setting,
            "significance": None if self.significance is None else self.significance.to_dict(),
            "alignment": self.alignment,
            "families": {name: self._family(name) for name in self.seed_groups},
            "controls": self.controls,
            "images": self.images,
            "pairs": self.pairs,
            "host_ms_per_image": self.ezhoi_ms,
            "bridge_ms_per_image": self.bridge_ms,
            "fingerprint": self.fingerprint,
            "provenance": self.provenance,
            "forced": self.forced,
            "degraded": self.degraded,
            "caveats": self.caveats,
            "versions": versions(),
        }

    def _family(self, name: str) -> dict[str, Any]:
        spreads = {group: self.spread(name, group) for group in self.groups}
        return {
            "variants": self.seed_groups[name],
            "mean_ap": {group: {"mean": mean, "standard_deviation": sd} for group, (mean, sd) in spreads.items()},
        }

    def table(self) -> str:
        """The results as text, one variant a row, differences below, then what is known of chance."""
        head = ["mAP", *self.groups, "ms/image"]
        rows = [[v, *(f"{self.mean_ap(v, g):.2f}" for g in self.groups), self._ms(v)] for v in self.ap]
        rows += [
            [f"{v} - {REFERENCE}", *(f"{self.difference(v, g):+.2f}" for g in self.groups), f"{self.bridge_ms[v]:+.2f}"]
            for v in self.ap
            if v != REFERENCE
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        line = "  ".join("-" * width for width in widths)
        text = [_row(head, widths), line, *(_row(row, widths) for row in rows)]
        text.insert(2 + len(self.ap), line)
        counts = "  ".join(f"{group} {len(index)}" for group, index in self.groups.items())
        text.append(f"{self.images} images, {self.pairs} pairs; classes: {counts}")
        text += self._chance()
        return "\n".join([*text, *self.warnings()])

    def _chance(self) -> list[str]:
        """What is known of chance: an interval and a p-value for each difference, and what they leave out."""
        known = self.significance
        if known is None:
            return ["One run without intervals: small differences may be chance."]
        rows = [["", *self.groups]]
        for variant, groups in known.difference.items():
            cells = [
                f"{self.difference(variant, g):+.2f} [{d.low:+.2f} {d.high:+.2f}] {p_text(d.p_adjusted)}"
                for g, d in groups.items()
            ]
            rows.append([variant, *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            f"difference to {REFERENCE} [{100 * known.level:g} % interval] p, adjusted for all variants:",
            *(_row(row, widths) for row in rows),
            f"Intervals are over images ({known.replicates} resamplings); they do not cover the seed of a bridge's training.",
        ]

    def _ms(self, variant: str) -> str:
        return "-" if self.ezhoi_ms is None else f"{self.ezhoi_ms + self.bridge_ms.get(variant, 0.0):.2f}"


def _row(cells: list[str], widths: list[int]) -> str:
    return "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])


def versions() -> dict[str, str]:
    """What computed the results."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ezhoi-diffusion": version("ezhoi-diffusion"),
    }

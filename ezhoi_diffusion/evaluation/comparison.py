"""One run, many variants of the same pairs: what each is worth, and the difference to the bare host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ezhoi_diffusion.evaluation.detection_ap import Algorithm
from ezhoi_diffusion.evaluation.significance import Significance

REFERENCE = "none"


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
    host_ms: mean time of the host's own forward pass on an image, None where the host did not run.
    bridge_ms: variant -> mean time it adds to an image.
    names: what each interaction class is called, where the host says so. annotations: [K] annotated pairs of each class.
    significance: intervals and p-values of a paired bootstrap over images. alignment: variant -> measure -> value.
    families: name of a bridge that was trained with several seeds -> its variants.
    """

    ap: dict[str, Tensor]
    groups: dict[str, Tensor]
    images: int
    pairs: int
    host_ms: float | None
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
    families: dict[str, list[str]] = field(default_factory=dict)
    sample: Sample | None = None

    def mean_ap(self, variant: str, group: str) -> float:
        """Mean AP of a group of classes, in percent."""
        return float(self.ap[variant][self.groups[group]].mean()) * 100

    def difference(self, variant: str, group: str) -> float:
        """Percentage points of mean AP over the bare host."""
        return self.mean_ap(variant, group) - self.mean_ap(REFERENCE, group)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; AP in percent."""
        return {
            "mean_ap": {v: {g: self.mean_ap(v, g) for g in self.groups} for v in self.ap},
            "difference": {v: {g: self.difference(v, g) for g in self.groups} for v in self.ap if v != REFERENCE},
            "per_class_ap": {v: (ap * 100).tolist() for v, ap in self.ap.items()},
            "classes": {group: index.tolist() for group, index in self.groups.items()},
            "images": self.images,
            "pairs": self.pairs,
            "host_ms_per_image": self.host_ms,
            "bridge_ms_per_image": self.bridge_ms,
            "fingerprint": self.fingerprint,
            "provenance": self.provenance,
            "forced": self.forced,
            "degraded": self.degraded,
        }

    def table(self) -> str:
        """The results as text, one variant a row, differences below."""
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
        text.append("One run, one seed: small differences may be chance.")
        text += [f"FORCED: {message}" for message in self.forced]
        text += [f"DEGRADED: {message}" for message in self.degraded.values()]
        return "\n".join(text)

    def _ms(self, variant: str) -> str:
        return "-" if self.host_ms is None else f"{self.host_ms + self.bridge_ms.get(variant, 0.0):.2f}"


def _row(cells: list[str], widths: list[int]) -> str:
    return "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])

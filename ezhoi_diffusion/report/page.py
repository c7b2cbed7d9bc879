"""A comparison as one HTML page. Pictures are embedded; nothing is fetched or run."""

from __future__ import annotations

import functools
import json
import math
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.bridge import PROTOCOLS
from ezhoi_diffusion.evaluation.bootstrap import MIN_IMAGES, POWER
from ezhoi_diffusion.evaluation.changes import Changes, changes
from ezhoi_diffusion.evaluation.comparison import FULL, REFERENCE, Comparison, p_text, versions
from ezhoi_diffusion.evaluation.table import interval_notes
from ezhoi_diffusion.report.figures import MAPPED, named, shown
from ezhoi_diffusion.report.headline import headline, main_bridge

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATE = Path(__file__).with_name("report.html.j2")
LISTED = 8  # largest gains and losses of single classes, each, and objects
PERFECT = {
    "verbs": "verbs of the pairs that interact",
    "interactiveness": "telling pairs that interact from background",
    "labels": "both",
}
MEASURES = {
    "centroid_gap": "distance between the mean unit feature and the mean unit text, 0 to 2; smaller is nearer",
    "mmd": "squared maximum mean discrepancy of unit features and unit texts; smaller is nearer, chance takes it below 0",
    "cosine_to_own_text": "mean cosine of annotated pairs to the texts of their own classes; larger is nearer",
    "recall_at_1": "share of annotated pairs with a class of their own as the nearest text",
    "recall_at_5": "share of annotated pairs with a class of their own among the five nearest texts",
    "top1": "share of annotated pairs whose highest possible logit is a class of their own",
    "calibration_error": "mean distance of a probability from the share that is right; smaller is better",
    "mean_resultant_length": "what all features share without the text mean, 0 to 1",
}
ALGORITHMS = {
    "11P": "11-point interpolated AP",
    "AUC": "area under the precision-recall curve",
    "VOC": "area under the interpolated precision-recall curve",
}


def page(comparison: Comparison, pictures: Mapping[str, Sequence[tuple[str, bytes]]], notes: Sequence[str]) -> str:
    """The page. pictures: name -> (alternative text, PNG) of each panel. notes: where alignment and mean AP disagree.

    Names come from third parties, and are escaped wherever they stand.
    """
    from jinja2 import Environment, StrictUndefined

    main = main_bridge(comparison)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        number=_number,
        signed=_signed,
        p=p_text,
        breakable=_breakable,
        json=_json,
        base64=lambda data: b64encode(data).decode(),
    )
    environment.tests.update(
        baseline=lambda name: name in comparison.baselines,
        nested=lambda value: isinstance(value, (dict, list)) and bool(value),
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        c=comparison,
        known=bool(comparison.replicates),
        headline=headline(comparison),
        level=f"{100 * comparison.level:g} %",
        tone=functools.partial(_tone, comparison),
        side=_side,
        reference=REFERENCE,
        full=FULL,
        ranked=comparison.ranked(),
        pictures=pictures,
        notes=notes,
        classes={variant: _class_table(comparison, variant) for variant in shown(comparison)},
        measures=list(dict.fromkeys(name for v in comparison.bridges.values() for name in v.alignment)),
        meaning=MEASURES,
        algorithm=ALGORITHMS[comparison.algorithm],
        versions=versions(),
        named=named(comparison),
        mapped=MAPPED,
        main=main,
        protocols=_protocols(comparison),
        meant=PROTOCOLS,
        detectable=_detectable(comparison, main),
        power=f"{100 * POWER:g} %",
        calibration=_calibration(comparison, main),
        read=interval_notes(comparison),
        enough=MIN_IMAGES,
        perfect=PERFECT,
    )


def _class_table(comparison: Comparison, variant: str) -> dict[str, Any]:
    """Counts, and the classes that change most: name, annotations, AP before and after, change, interval."""
    found = changes(comparison, variant)
    gains = int((found.sign > 0).sum())
    losses = int((found.sign < 0).sum())
    return {
        "counts": found.counts(),
        "gains": [_class(comparison, variant, found, at) for at in range(min(gains, LISTED))],
        "losses": [_class(comparison, variant, found, len(found.points) - 1 - at) for at in range(min(losses, LISTED))],
    }


def _class(comparison: Comparison, variant: str, found: Changes, at: int) -> dict[str, Any]:
    index = int(found.classes[at])
    bounds = [] if found.bounds is None else found.bounds[at].tolist()
    return {
        "name": comparison.names[index] if comparison.names else f"interaction {index}",
        "annotations": int(comparison.annotations[index]),
        "before": float(comparison.variants[REFERENCE].ap[index]) * 100,
        "after": float(comparison.bridges[variant].ap[index]) * 100,
        "change": float(found.points[at]),
        "interval": None if any(map(math.isnan, bounds)) else bounds,  # NaN: annotated in too few images
    }


def _tone(comparison: Comparison, name: str, group: str) -> str:
    """The class of a table cell: on which side of 0 its interval lies, and whether it is significant."""
    bounds = comparison.bounds(name, group)
    if bounds is None:
        return ""
    return f"{_side(bounds)} significant" if comparison.is_significant(name, group) else _side(bounds)


def _side(bounds: Sequence[float]) -> str:
    low, high = bounds
    return "gain" if low > 0 else "loss" if high < 0 else "unclear"


def _protocols(comparison: Comparison) -> dict[str, list[str]]:
    """Protocol -> bridges, in the order of `PROTOCOLS`."""
    bridges = [result for name, result in comparison.bridges.items() if name != REFERENCE]
    of = {protocol: [b.name for b in bridges if b.protocol == protocol] for protocol in PROTOCOLS}
    return {protocol: names for protocol, names in of.items() if names}


def _detectable(comparison: Comparison, name: str | None) -> dict[str, float]:
    """Group -> the smallest change that this comparison was likely to find for a bridge; empty without intervals."""
    found = {group: None if name is None else comparison.found(name, group) for group in comparison.groups}
    return {group: one.detectable(comparison.level) for group, one in found.items() if one is not None}


def _calibration(comparison: Comparison, name: str | None) -> list[dict[str, Any]]:
    """The objects with the largest calibration errors under bare EZ-HOI, beside those of a bridge's first variant."""
    variant = next(iter(comparison.seed_groups.get(name, [name])), None) if name is not None else None
    bare, bridged = comparison.calibration.get(REFERENCE, []), comparison.calibration.get(variant or "", [])
    after = {entry["object"]: entry for entry in bridged}
    worst = sorted(bare, key=lambda entry: -entry["calibration_error"])[:LISTED]
    return [{"before": entry, "after": after.get(entry["object"])} for entry in worst]


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _breakable(name: str) -> Markup:
    """A name that may break after a comma, a slash or the like."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[,;:=/@])", name))  # which escapes what it joins


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)

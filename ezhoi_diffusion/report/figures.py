"""The pictures of a comparison, as small panels: side by side in a file, one below the other on a phone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion.evaluation.changes import changes
from ezhoi_diffusion.evaluation.comparison import FULL, REFERENCE, Comparison
from ezhoi_diffusion.report.png import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

WIDTH, DPI, COLORS = 4.0, 128, 64  # inches: on a phone, letters of 9 points stay readable
COLUMNS = 3
LETTERS, TITLE = 24, 48  # of a variant's name in a line, beside its row and above a panel
FAR = 5  # times the median distance from the line; what is farther is written at the edge
NUM_SHOWN, MAX_NAMED = 3, 10  # variants with pictures of their own, and with colours in pictures of all
MAPPED = 200  # pairs in the map of both modalities: t-SNE takes seconds
PICTURED = ("centroid_gap", "cosine_to_own_text", "calibration_error")  # measures worth a picture against mean AP
MIN_MAPPED = 5  # points of a map; fewer show nothing
BINS = 40
GAIN, LOSS, UNCLEAR, GRID = "#0b7a5b", "#c2410c", "0.55", "0.88"


@dataclass(frozen=True, eq=False)
class Panel:
    """A small picture.

    Attributes:
        title: The heading.
        alt: What it shows, in words for those who cannot see it.
        height: Inches.
        draw: Draws it.
    """

    title: str
    alt: str
    height: float
    draw: Callable[[Axes], None]


def pictures(comparison: Comparison) -> dict[str, list[Panel]]:
    """The panels of every picture that this comparison has figures for, by the picture's name."""
    made = {
        "comparison": _absolute(comparison),
        "forest": _forest(comparison),
        "per_class": [_per_class(comparison, variant) for variant in shown(comparison)],
        "cost": [_cost(comparison)] if len(comparison.bridges) > 1 else [],
        "measures": _measures(comparison),
        "embedding": _embedding(comparison),
        "histograms": _histograms(comparison),
    }
    return {name: panels for name, panels in made.items() if panels}


def shown(comparison: Comparison) -> list[str]:
    """The few variants that get pictures of single classes and of features: the best by full mean AP."""
    return comparison.ranked()[:NUM_SHOWN]


def named(comparison: Comparison) -> list[str]:
    """The variants with a colour and a name in pictures of all: all if few, else bare EZ-HOI and those of `shown`."""
    variants = [REFERENCE, *comparison.ranked()]
    return variants if len(variants) <= MAX_NAMED else [REFERENCE, *shown(comparison)]


def _colors(comparison: Comparison) -> dict[str, str]:
    """The colour of every variant, the same in all pictures. Variants without a name come first, and lie below."""
    known = {variant: f"C{number}" for number, variant in enumerate(named(comparison))}
    return {**{variant: "0.75" for variant in comparison.bridges if variant not in known}, **known}


def render(panel: Panel) -> Image.Image:
    """The panel, drawn without a display and without pyplot's global state."""
    figure = new_figure(figsize=(WIDTH, panel.height), layout="constrained", dpi=DPI)
    # only now, because new_figure guards matplotlib's import
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    axes = figure.subplots()
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    panel.draw(axes)
    figure.suptitle(panel.title, x=0.01, ha="left", fontsize=9)
    canvas: Any = FigureCanvasAgg(figure)  # untyped
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def joined(drawn: Sequence[Image.Image]) -> Image.Image:
    """Rendered panels as one picture, at most three beside each other."""
    from PIL import Image

    rows = [drawn[i : i + COLUMNS] for i in range(0, len(drawn), COLUMNS)]
    heights = [max(panel.height for panel in row) for row in rows]
    whole = Image.new("RGB", (max(sum(panel.width for panel in row) for row in rows), sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, panel in enumerate(row):
            whole.paste(panel, (column * panel.width, sum(heights[:number])))
    return whole


def png(drawn: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file. Few colours need a third of the space."""
    picture = BytesIO()
    drawn.quantize(COLORS).save(picture, "png", optimize=True, dpi=(DPI, DPI))
    return picture.getvalue()


# -- intervals: a line for each variant ------------------------------------------------------------------------


def _absolute(comparison: Comparison) -> list[Panel]:
    """Mean AP of every variant, a panel a group."""
    panels = []
    for group in comparison.groups:
        rows = [
            _Row(v, comparison.mean_ap(v, group), _interval(comparison, v, group), "C0", True)
            for v in [REFERENCE, *comparison.ranked()]
        ]
        title = f"{group}, {len(comparison.groups[group])} classes: mAP, %"
        panels.append(_intervals(rows, rows[0].value, title, f"Mean AP of {len(rows)} variants in {group}."))
    return panels


def _interval(comparison: Comparison, variant: str, group: str) -> tuple[float, float] | None:
    bootstrap = comparison.bridges[variant].bootstrap
    return None if bootstrap is None else bootstrap.mean_ap[group]


def _forest(comparison: Comparison) -> list[Panel]:
    """Differences to bare EZ-HOI, a panel a group.

    Grey: the interval contains 0. Green or orange: it does not. Full: the p-value that counts agrees.
    """
    panels = []
    for group in comparison.groups:
        rows = []
        for v in comparison.ranked():
            bounds = comparison.bounds(v, group)
            color = UNCLEAR if bounds is None or bounds[0] <= 0 <= bounds[1] else GAIN if bounds[0] > 0 else LOSS
            rows.append(_Row(v, comparison.difference(v, group), bounds, color, comparison.is_significant(v, group)))
        above, below = (sum(row.color == color for row in rows) for color in (GAIN, LOSS))
        alt = f"Differences to {REFERENCE} in {group} mean AP, {len(rows)} variants. " + (
            f"Intervals above 0: {above}; below 0: {below}; containing 0: {len(rows) - above - below}."
            if comparison.replicates
            else "There are no intervals."
        )
        title = f"{group}, {len(comparison.groups[group])} classes: points over {REFERENCE}"
        panels.append(_intervals(rows, 0.0, title, alt))
    return panels


@dataclass(frozen=True)
class _Row:
    variant: str
    value: float
    bounds: tuple[float, float] | None
    color: str
    full: bool


def _frame(rows: Sequence[_Row], zero: float) -> tuple[float, float] | None:
    """The limits of a picture in which few variants are far off. None: show all."""
    spans = [(min(row.value, *(row.bounds or ()), zero), max(row.value, *(row.bounds or ()), zero)) for row in rows]
    reaches = [max(zero - low, high - zero) for low, high in spans]
    middle = median([reach for reach in reaches if reach > 0] or [0.0])
    near = [span for span, reach in zip(spans, reaches, strict=True) if reach <= FAR * middle]
    if len(near) == len(spans):
        return None
    low, high = min(low for low, _ in near), max(high for _, high in near)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _intervals(rows: Sequence[_Row], zero: float, title: str, alt: str) -> Panel:
    """One variant a row, around a line at `zero`. A variant that is far off is written at the edge."""
    frame = _frame(rows, zero)
    labels = [_label(row.variant) for row in rows]
    at = [0.0]  # inches from the first row
    for label, following in pairwise(labels):
        at.append(at[-1] + 0.2 + 0.06 * (label + following).count("\n"))  # a second line needs more room

    def draw(axes: Axes) -> None:
        axes.axvline(zero, color="black", linewidth=1)
        if frame is not None:
            axes.set_xlim(*frame)
        for y, row in zip(at, rows, strict=True):
            if frame is not None and not frame[0] <= row.value <= frame[1]:
                left = row.value < frame[0]
                words = f"◂ {row.value:+.1f}" if left else f"{row.value:+.1f} ▸"
                edge, side = (frame[0], "left") if left else (frame[1], "right")
                axes.text(edge, y, words, color=row.color, fontsize=8, ha=side, va="center")
                continue
            if row.bounds is not None:
                axes.plot(row.bounds, (y, y), color=row.color, linewidth=2.2, solid_capstyle="butt")
            axes.plot(
                row.value, y, "o", color=row.color, markersize=5, markerfacecolor=row.color if row.full else "white"
            )
        axes.set_yticks(at, labels, fontsize=8)
        axes.set_ylim(at[-1] + 0.2, -0.2)
        axes.grid(axis="x", color=GRID)

    return Panel(title, alt, at[-1] + 1.0, draw)


# -- single classes ----------------------------------------------------------------------------------------------


def _per_class(comparison: Comparison, variant: str) -> Panel:
    """Every class's change, sorted; those that chance does not explain are full in colour."""
    found = changes(comparison, variant)
    counts = found.counts()
    words = [f"{counts['gains']} gain, {counts['losses']} lose, {counts['unchanged']} unchanged"]
    if found.bounds is not None:
        words.append(f"beyond chance: {counts['certain gains']} gain, {counts['certain losses']} lose")

    def draw(axes: Axes) -> None:
        at = torch.arange(len(found.points))
        for sign, color in ((1, GAIN), (-1, LOSS)):
            for certain, alpha in ((False, 0.35), (True, 1.0)):
                of = (found.sign == sign) & (found.certain == certain)
                width = min(20.0, 200 / len(at))
                axes.vlines(at[of].tolist(), 0, found.points[of].tolist(), color=color, alpha=alpha, linewidth=width)
        axes.axhline(0, color="black", linewidth=1)
        axes.set_xlabel("classes, by change", fontsize=8)
        axes.set_ylabel("points of AP", fontsize=8)
        axes.grid(axis="y", color=GRID)

    alt = f"Change of AP in each of {len(found.points)} classes under {variant}, sorted: {'; '.join(words)}."
    return Panel("\n".join([_label(variant, TITLE), *words]), alt, 3.1, draw)


# -- all variants as points --------------------------------------------------------------------------------------


def _cost(comparison: Comparison) -> Panel:
    """Time that a variant adds to an image, against its mean AP."""

    def draw(axes: Axes) -> None:
        _points(comparison, axes, {name: v.added_ms for name, v in comparison.bridges.items()}, "ms added to an image")
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlim(left=-0.02)
        axes.xaxis.set_major_formatter("{x:g}")

    figures = (
        f"{v} {comparison.bridges[v].added_ms:.2f} ms, {comparison.mean_ap(v, FULL):.2f} %" for v in named(comparison)
    )
    alt = f"Time that a variant adds to an image, against full mean AP: {'; '.join(figures)}."
    return Panel("time against full mAP", alt, 3.2 + 0.12 * len(named(comparison)), draw)


def _measures(comparison: Comparison) -> list[Panel]:
    """Measures of alignment against mean AP: whether what is nearer to the texts also detects better."""
    panels = []
    for measure in PICTURED:
        found = {
            name: value for name, v in comparison.bridges.items() if (value := v.alignment.get(measure)) is not None
        }
        if len(found) > 2:  # two points show no relation
            panels.append(_measure(comparison, measure.replace("_", " "), found))
    return panels


def _measure(comparison: Comparison, measure: str, found: Mapping[str, float]) -> Panel:
    alt = f"{measure} against full mean AP, {len(found)} variants; the table has the figures."
    height = 3.0 + 0.12 * len(named(comparison))
    return Panel(f"{measure} against full mAP", alt, height, lambda axes: _points(comparison, axes, found, measure))


def _points(comparison: Comparison, axes: Axes, at: Mapping[str, float], what: str) -> None:
    colors = _colors(comparison)
    for variant in filter(at.__contains__, colors):
        x, color = at[variant], colors[variant]
        interval = _interval(comparison, variant, FULL)
        if interval is not None:
            axes.plot((x, x), interval, color=color, linewidth=1.2)
        label = _label(variant) if variant in named(comparison) else None
        axes.plot(x, comparison.mean_ap(variant, FULL), "o", color=color, markersize=5, label=label)
    if len(comparison.bridges) > MAX_NAMED:
        axes.plot([], [], "o", color="0.75", markersize=5, label="others")
    axes.set_xlabel(what, fontsize=8)
    axes.set_ylabel("full mAP, %", fontsize=8)
    axes.grid(color=GRID)
    _legend(axes)


# -- features and texts ----------------------------------------------------------------------------------------------


def _histograms(comparison: Comparison) -> list[Panel]:
    """Cosine to the nearest text, and norms, of the sampled pairs."""
    samples = _samples(comparison)
    if not samples or comparison.sample_text is None:
        return []
    text = normalize(comparison.sample_text.float(), dim=1)
    cosines = {v: (normalize(x, dim=1) @ text.T).amax(1) for v, x in samples.items()}
    return [
        _histogram(comparison, "cosine to the nearest text", cosines),
        _histogram(comparison, "norm of a feature", {v: x.norm(dim=1) for v, x in samples.items()}),
    ]


def _samples(comparison: Comparison) -> dict[str, Tensor]:
    """The sampled features [R, D] of bare EZ-HOI and of the variants in `shown`, where they were kept."""
    samples = {v: comparison.bridges[v].sample for v in [REFERENCE, *shown(comparison)]}
    return {v: x.float() for v, x in samples.items() if x is not None}


def _histogram(comparison: Comparison, what: str, values: Mapping[str, Tensor]) -> Panel:
    low, high = (float(f(torch.cat([*values.values()]))) for f in (torch.min, torch.max))
    high = max(high, low + 1e-6)
    at = torch.linspace(low, high, 2 * BINS + 1)[1::2]

    def draw(axes: Axes) -> None:
        for variant, value in values.items():
            counts, color = torch.histc(value, BINS, low, high).tolist(), _colors(comparison)[variant]
            axes.plot(at.tolist(), counts, drawstyle="steps-mid", color=color, linewidth=1.3, label=_label(variant))
        axes.set_xlabel(what, fontsize=8)
        axes.set_ylabel("pairs", fontsize=8)
        _legend(axes)

    medians = "; ".join(f"{name} {float(value.median()):.3f}" for name, value in values.items())
    return Panel(what, f"Histogram of the {what}. Medians: {medians}.", 3.3 + 0.12 * len(values), draw)


def _embedding(comparison: Comparison) -> list[Panel]:
    """One map of texts and pairs, a panel a variant. A variant that changes no feature is left out."""
    from ezhoi_diffusion.report.embedding import embed

    samples = {v: x[:MAPPED] for v, x in _samples(comparison).items()}
    if comparison.sample_text is None or len(samples[REFERENCE]) + len(comparison.sample_text) < MIN_MAPPED:
        return []
    moved = [v for v, x in samples.items() if not torch.equal(x, samples[REFERENCE])][: COLUMNS - 1]
    *parts, text = embed([*(samples[v] for v in (REFERENCE, *moved)), comparison.sample_text], "tsne")
    points = dict(zip((REFERENCE, *moved), parts, strict=True))
    return [_map(comparison, variant, points, text) for variant in points]


def _map(comparison: Comparison, variant: str, points: Mapping[str, Tensor], text: Tensor) -> Panel:
    everything = torch.cat([*points.values(), text])
    margin = 0.03 * (everything.amax(0) - everything.amin(0))
    (left, bottom), (right, top) = (everything.amin(0) - margin).tolist(), (everything.amax(0) + margin).tolist()

    def draw(axes: Axes) -> None:
        axes.scatter(text[:, 0].tolist(), text[:, 1].tolist(), s=12, marker="x", linewidth=0.7, color="0.35")
        for name, color in ((REFERENCE, "0.75"), (variant, _colors(comparison)[variant])):
            axes.scatter(points[name][:, 0].tolist(), points[name][:, 1].tolist(), s=7, color=color)
        axes.set(xticks=[], yticks=[], xlim=(left, right), ylim=(bottom, top))  # the same in every panel
        axes.spines[:].set_visible(False)

    alt = f"Map of {len(points[variant])} pairs of {variant} among {len(text)} texts."
    return Panel(_label(variant, TITLE), alt, 3.8, draw)


# -- words in pictures -------------------------------------------------------------------------------------------


def _label(name: str, letters: int = LETTERS) -> str:
    """A variant's name in lines; what is too long loses its middle. No letter of it is a command to matplotlib."""
    if len(name) > 2 * LETTERS:
        name = f"{name[: LETTERS - 1]}…{name[-LETTERS:]}"
    lines = [""]
    for piece in re.split(r"(?<=[\W_])", name):
        for part in (piece[i : i + letters] for i in range(0, len(piece), letters)):
            lines += [""] if len(lines[-1]) + len(part) > letters else []
            lines[-1] += part
    return "\n".join(lines).replace("$", r"\$")


def _legend(axes: Axes) -> None:
    """Below the axes, where it covers no point."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.18), ncols=2, frameon=False, fontsize=8)

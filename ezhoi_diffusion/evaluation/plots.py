"""Pictures beside the numbers. Drawn without a display, and without touching pyplot's global state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ezhoi_diffusion.evaluation.comparison import REFERENCE, Comparison
from ezhoi_diffusion.features.statistics import unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _figure(columns: int, width: float = 5.0) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 4.0), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130, metadata={"Software": None})


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Mean AP of every variant by group, and the difference to the bare host."""
    figure, (absolute, change) = _figure(2, 6.5)
    groups, variants = list(comparison.groups), list(comparison.ap)
    width = 0.8 / len(variants)
    for number, variant in enumerate(variants):
        at = torch.arange(len(groups)) + (number - (len(variants) - 1) / 2) * width
        color = f"C{number}"
        absolute.bar(at, [comparison.mean_ap(variant, g) for g in groups], width, label=variant, color=color)
        if variant != REFERENCE:
            change.bar(at, [comparison.difference(variant, g) for g in groups], width, label=variant, color=color)
    for axes, title in ((absolute, "mAP, %"), (change, f"difference to {REFERENCE}, points")):
        axes.set_xticks(range(len(groups)), [f"{g}\n{len(comparison.groups[g])} classes" for g in groups])
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    change.axhline(0, color="black", linewidth=0.8)
    figure.legend(*absolute.get_legend_handles_labels(), loc="outside upper center", ncols=len(variants), frameon=False)
    _save(figure, path)


def plot_effect(before: Tensor, after: Tensor, text: Tensor, path: Path) -> None:
    """What a bridge does to features [N, D]: cosine to the nearest of the texts [K, D], norms, and the two side by side."""
    figure, (cosine, norms, pairs) = _figure(3)
    near = [(unit(x) @ unit(text).T).max(-1).values for x in (before, after)]
    for axes, values, label in (
        (cosine, near, "cosine to the nearest text"),
        (norms, [x.norm(dim=-1) for x in (before, after)], "norm"),
    ):
        for value, name in zip(values, ("before", "after"), strict=True):
            axes.hist(value.tolist(), bins=40, alpha=0.6, label=name)
        axes.set_title(label, loc="left")
        axes.set_ylabel("pairs")
    figure.legend(*cosine.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    pairs.scatter(near[0].tolist(), near[1].tolist(), s=4, alpha=0.4)
    pairs.axline((float(near[0].mean()),) * 2, slope=1, color="black", linewidth=0.8)
    pairs.set(xlabel="cosine before", ylabel="cosine after")
    pairs.set_title("each pair", loc="left")
    for axes in (cosine, norms, pairs):
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_training(history: list[dict[str, float]], bar: float | None, path: Path) -> None:
    """Training and validation loss by step, with the closed-form estimate's loss as the bar to clear."""
    figure, (axes,) = _figure(1, 7.0)
    for key, label in (("loss", "training"), ("val_loss", "validation, EMA")):
        points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    if bar is not None:
        axes.axhline(bar, color="black", linewidth=0.8, linestyle="--", label="closed-form isotropic Wiener")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)

"""Pictures of features, of a training, and of the effect of a bridge on single pairs.

They need no display and leave pyplot's global state alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ezhoi_diffusion.evaluation.effect import Effect
from ezhoi_diffusion.report.png import new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _figure(columns: int, width: float = 5.0) -> tuple[Figure, list[Axes]]:
    figure = new_figure(figsize=(width * columns, 4.0), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def plot_effect(effect: Effect, path: Path) -> None:
    """Draw the effect of a bridge on single pairs: similarity to the texts, norms, and changes of the top class."""
    figure, (cosine, norms, pairs, top) = _figure(4, 4.2)
    near = effect.similarity()
    for axes, values, label in (
        (cosine, near, "cosine to the nearest text"),
        (norms, effect.norms(), "norm"),
    ):
        low, high = float(torch.cat(values).min()), float(torch.cat(values).max())
        for value, name in zip(values, ("before", "after"), strict=True):
            axes.hist(value.tolist(), bins=40, range=(low, max(high, low + 1e-6)), alpha=0.6, label=name)
        axes.set_title(label, loc="left")
        axes.set_ylabel("pairs")
    figure.legend(*cosine.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    pairs.scatter(near[0].tolist(), near[1].tolist(), s=4, alpha=0.4)
    pairs.axline((float(near[0].mean()),) * 2, slope=1, color="black", linewidth=0.8)
    pairs.set(xlabel="cosine before", ylabel="cosine after")
    pairs.set_title("each pair (above the line: nearer)", loc="left")
    outcome = effect.outcome()
    bars = {name: outcome[name] for name in ("unchanged", "to right", "to wrong", "other")}
    colors = ("0.7", "C2", "C3", "C0")
    drawn = top.bar(list(bars), list(bars.values()), color=colors)
    top.bar_label(drawn)
    top.set_ylabel("pairs")
    top.set_title("top class by EZ-HOI's score", loc="left")
    for axes in (cosine, norms, pairs, top):
        axes.spines[["top", "right"]].set_visible(False)
    save_png(figure, path)


def plot_embedding(points: Sequence[Tensor], method: str, path: Path) -> None:
    """Draw a map of both modalities: points [P, 2] of the features before and after, and [N_sel, 2] of the texts."""
    figure, (axes,) = _figure(1, 7.0)
    for part, label, size, marker in zip(
        points, ("before", "after", "empirical"), (6, 6, 22), ("o", "o", "x"), strict=True
    ):
        axes.scatter(part[:, 0].tolist(), part[:, 1].tolist(), s=size, marker=marker, alpha=0.6, label=label)
    axes.set_title(f"{method}, cosine distances; only neighbourhoods mean something", loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(frameon=False)
    save_png(figure, path)


def plot_statistics(norms: tuple[Tensor, Tensor], cosines: tuple[Tensor, Tensor, Tensor], path: Path) -> None:
    """Draw norms of (visual, text) features, and cosines (visual-visual, text-text, visual-text) of random features."""
    figure, (norm, cosine) = _figure(2)
    for axes, values, names, title in (
        (norm, norms, ("visual", "text"), "norm of a feature"),
        (cosine, cosines, ("visual-visual", "text-text", "visual-text"), "cosine of two features"),
    ):
        for value, name in zip(values, names, strict=True):
            axes.hist(value.double().numpy(), bins=40, density=True, alpha=0.5, label=name)
        axes.set_title(title, loc="left")
        axes.set_ylabel("density")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    save_png(figure, path)


_BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}


def plot_training(facts: dict[str, Any], path: Path) -> None:
    """Draw the curve of a training.json: losses and learning rate by step, and validation loss by range of timesteps.

    The baseline is the loss of the closed-form isotropic estimate. In the second panel it is 1 for each range.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (axes, by_range) = _figure(2, 6.5)
    history = facts["history"]
    validated = [record for record in history if "val_loss" in record]
    best = next(record for record in validated if record["step"] == facts["best_step"])
    last = history[-1]
    for key, records, label in (("loss", history, "training"), ("val_loss", validated, "validation, averaged weights")):
        marker = "." if len(records) == 1 else None
        axes.plot([r["step"] for r in records], [r[key] for r in records], label=label, marker=marker)
    axes.axhline(facts["isotropic_val_loss"], color="black", linewidth=0.8, linestyle="--", label="isotropic estimate")
    axes.plot(best["step"], best["val_loss"], "*", color="C1", markersize=12, label=f"best: step {best['step']}")
    axes.axvline(last["step"], color="grey", linewidth=0.8, linestyle=":", label=f"stopped: step {last['step']}")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(facts["stopped"], loc="left", fontsize="medium")
    rate = axes.twinx()
    rate.plot([r["step"] for r in history], [r["lr"] for r in history], color="C2", linewidth=0.8)
    rate.set_ylim(0, 1.05 * max(r["lr"] for r in history))
    rate.ticklabel_format(axis="y", scilimits=(0, 0))
    rate.set_ylabel("learning rate", color="C2")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend([*handles, *rate.lines], [*labels, "learning rate"], frameon=False, fontsize="small", **_BELOW, ncols=3)
    for number, ((low, high), baseline) in enumerate(
        zip(facts["ranges"], facts["isotropic_val_loss_by_range"], strict=True)
    ):
        shares = [record["val_loss_by_range"][number] / baseline for record in validated]
        # as dark as there is noise
        color = str(0.8 - 0.8 * number / (len(facts["ranges"]) - 1))
        by_range.plot([r["step"] for r in validated], shares, color=color, marker=".", label=f"{low} to {high}")
    by_range.axhline(1, color="black", linewidth=0.8, linestyle="--")
    by_range.set(xlabel="step", ylabel="validation loss / isotropic estimate's")
    by_range.set_title("by timestep; above 1 nothing was learned", loc="left", fontsize="medium")
    by_range.set_ylim(bottom=0)
    by_range.legend(frameon=False, fontsize="small", title="timesteps", **_BELOW, ncols=5)
    axes.spines["top"].set_visible(False)
    rate.spines["top"].set_visible(False)
    by_range.spines[["top", "right"]].set_visible(False)
    save_png(figure, path)

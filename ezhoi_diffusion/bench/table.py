"""The result of a benchmark as tables and as a picture."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from ezhoi_diffusion.report.png import new_figure, save_png

UNTIMED = "*"
MIN_DISTANCE = 1e-8  # stands for 0 on a logarithmic axis
Table = tuple[str, list[str], list[list[str]]]
"""Caption, titles of the columns, rows."""


def summary(result: dict[str, Any]) -> str:
    """Warnings, what was measured and where, and the training next to the closed-form Gaussian."""
    machine, data, trained = result["machine"], result["data"], result["closed_form"]
    lines = [
        *(f"warning: {warning}" for warning in result["warnings"]),
        f"{machine['device']}, {machine['cpu']}, {machine['cores']} cores, threads {machine['threads']}, "
        f"torch {machine['torch']}, load average {machine['load']:.2f} at the start",
        f"features: {data['features']} of width {data['dim']}, {data['texts']} texts, {data['origin']}",
        f"bridge: {data['bridge']}",
    ]
    if trained:
        when = f"not reached in {trained['steps']} steps, {trained['seconds']:.0f} s: {trained['val_loss']:.4f}"
        if trained["reached_at_step"]:
            when = f"below it after {trained['reached_at_step']} steps, {trained['reached_after_seconds']:.0f} s"
        lines.append(
            f"loss of the closed-form Gaussian on held-out texts {trained['baseline_loss']:.4f}; the training: {when}"
        )
    return "\n".join([*lines, f"measured in {result['seconds']:.0f} s"])


def tables(result: dict[str, Any]) -> list[Table]:
    """List the tables of bridging, of training and of memory."""
    on_gpu = result["machine"]["device"] != "CPU"
    return [
        _sampler(result),
        (
            f"Training at batch {result['config']['batch']}: median of the steps a second [quartiles]. Trainer1D is that of "
            "denoising-diffusion-pytorch, as published, with a data loader's worker for every core.",
            ["trainer, network", "steps/s", "x Trainer1D, unet1d"],
            [
                [entry["name"], _spread(entry["steps_per_second"]), _figure(entry["ratio"])]
                for entry in result["training"]
            ],
        ),
        (
            "Peak memory, each in a process of its own: "
            + ("allocated on the GPU at most." if on_gpu else "growth of the process's peak resident size."),
            ["network", "of", "MiB"],
            [[entry["name"], entry["of"], f"{entry['bytes'] / 2**20:.0f}"] for entry in result["memory"]],
        ),
    ]


def _sampler(result: dict[str, Any]) -> Table:
    sizes = [str(pairs) for pairs in result["config"]["sizes"]]
    caption = (
        "Bridging the pairs of an image: median of the milliseconds [quartiles]; the guide's time divided by it; and the cosine "
        "with the result of the same network with an evaluation at every timestep below t0."
    )
    rows = []
    for entry in result["sampler"]:
        name, near = entry["name"], entry["fidelity"]
        if entry["timed_evaluations"] < entry["evaluations"]:
            name += UNTIMED
        rows.append(
            [
                name,
                str(entry["start_timestep"]),
                str(entry["evaluations"]),
                *(_spread(entry["ms"][pairs]) for pairs in sizes),
                *(_figure(entry["ratio"][pairs]) for pairs in sizes),
                *(f"{near[key]:.4f}" if near else "" for key in ("cosine", "cosine_min", "top1")),
            ]
        )
    guide = result["sampler"][0]
    timed, evaluations = guide["timed_evaluations"], guide["evaluations"]
    caption += f"\n{UNTIMED} timed on {timed} of its {evaluations} evaluations, times {evaluations / timed:g}"
    head = ["bridge", "t0", "S", *(f"ms, {pairs} pairs" for pairs in sizes), *(f"x, {pairs}" for pairs in sizes)]
    return caption, [*head, "cosine, mean", "cosine, min", "top-1"], rows


def _spread(values: dict[str, float]) -> str:
    return f"{_figure(values['median'])} [{_figure(values['low'])}, {_figure(values['high'])}]"


def _figure(value: float) -> str:
    """Three digits without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def plot_bench(result: dict[str, Any], path: Path) -> None:
    """Plot milliseconds against 1 − mean cosine, one point for each bridge, for the middle of the measured sizes.

    The guide's system is a vertical line: its cost is measured, its result is not compared.
    """
    sizes = result["config"]["sizes"]
    pairs = str(sizes[len(sizes) // 2])
    figure = new_figure(figsize=(7.0, 4.6), layout="constrained")
    axes = figure.subplots()
    guide, *entries = result["sampler"]
    label = f"{guide['name']}, {guide['evaluations']} evaluations"
    axes.axvline(guide["ms"][pairs]["median"], color="black", linewidth=0.8, linestyle="--", label=label)
    compared = [entry for entry in entries if entry["fidelity"]]
    for label, group in groupby(compared, lambda e: f"{e['denoiser']}, from timestep {e['start_timestep']}"):
        drawn = list(group)
        points = [(e["ms"][pairs]["median"], max(MIN_DISTANCE, 1 - e["fidelity"]["cosine"])) for e in drawn]
        axes.plot(*zip(*points, strict=True), "o", label=label)
        for entry, point in zip(drawn, points, strict=True):
            axes.annotate(str(entry["evaluations"]), point, xytext=(4, 4), textcoords="offset points", fontsize="small")
    axes.set(
        xscale="log", yscale="log", xlabel=f"ms an image of {pairs} pairs", ylabel="1 − mean cosine to all evaluations"
    )
    axes.set_title(f"{result['machine']['device']}; numbers are evaluations", loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    save_png(figure, path)

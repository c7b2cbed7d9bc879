"""The result of a benchmark as tables and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ezhoi_diffusion.report.png import save_png

UNTIMED = "*"
MIN_DISTANCE = 1e-8  # stands for 0 on a logarithmic axis


def table(result: dict[str, Any]) -> str:
    """Format all results as Markdown."""
    machine, data = result["machine"], result["data"]
    parts = [
        f"{machine['device']}{'' if machine['device'] == 'CPU' else ', CPU'} {machine['cpu']}, {machine['cores']} cores, "
        f"threads {machine['threads']}, torch {machine['torch']}, load average {machine['load']:.2f} at the start\n"
        f"features: {data['features']} of width {data['dim']}, {data['texts']} texts, {data['origin']}; bridge: {data['bridge']}",
        *([f"warning: {warning}" for warning in result["warnings"]]),
        _sampler(result),
        _training(result),
        *_closed_form(result),
        _memory(result),
        f"measured in {result['seconds']:.0f} s",
    ]
    return "\n\n".join(parts)


def _sampler(result: dict[str, Any]) -> str:
    sizes, entries = result["config"]["sizes"], result["sampler"]
    head = [
        "bridge", "t0", "S", *(f"ms, {pairs} pairs" for pairs in sizes), *(f"x, {pairs}" for pairs in sizes),
        "cosine, mean", "cosine, min", "top-1",
    ]  # fmt: skip
    rows = []
    for entry in entries:
        near, mark = entry["fidelity"], UNTIMED if entry["timed_evaluations"] < entry["evaluations"] else ""
        rows.append(
            [
                f"{entry['name']}{mark}",
                str(entry["start_timestep"]),
                str(entry["evaluations"]),
                *(_spread(entry["ms"][str(pairs)]) for pairs in sizes),
                *(f"{_figure(entry['ratio'][str(pairs)])}" for pairs in sizes),
                *(
                    [f"{near['cosine']:.4f}", f"{near['cosine_min']:.4f}", f"{near['top1']:.3f}"]
                    if near
                    else ["", "", ""]
                ),
            ]
        )
    slow = next(entry for entry in entries if entry["timed_evaluations"] < entry["evaluations"])
    swept = sum(entry["fidelity"] is not None for entry in entries) > 1
    reached = ", ".join(f"{minimum}: {steps or 'not reached'}" for minimum, steps in result["fewest"].items())
    return "\n".join(
        [
            "Bridging the pairs of an image: median of the milliseconds [quartiles]; the guide's time divided by it; and the "
            "cosine with the result of the same network with an evaluation at every timestep below t0 (of a student: its teacher's)",
            "",
            _grid(head, rows),
            "",
            f"{UNTIMED} timed on {slow['timed_evaluations']} of its {slow['evaluations']} evaluations, times "
            f"{slow['evaluations'] / slow['timed_evaluations']:g}",
            *([f"fewest evaluations S from timestep 600 that reach a mean cosine: {reached}"] if swept else []),
        ]
    )


def _closed_form(result: dict[str, Any]) -> list[str]:
    """Return nothing where no bridge was trained."""
    facts = result["closed_form"]
    if facts is None:
        return []
    when = (
        f"not reached in {facts['steps']} steps, {facts['seconds']:.0f} s: {facts['val_loss']:.4f}"
        if facts["reached_at_step"] is None
        else f"below it after {facts['reached_at_step']} steps, {facts['reached_after_seconds']:.0f} s"
    )
    return [f"Loss of the closed-form Gaussian on held-out texts {facts['baseline_loss']:.4f}; the training: {when}"]


def _training(result: dict[str, Any]) -> str:
    rows = [
        [entry["name"], str(entry["batch"]), _spread(entry["steps_per_second"]), f"{_figure(entry['ratio'])}"]
        for entry in result["training"]
    ]
    return "\n".join(
        [
            "Training: median of the steps a second [quartiles]; Trainer1D is that of denoising-diffusion-pytorch, as published, "
            "with a data loader's worker for every core",
            "",
            _grid(["trainer, network", "batch", "steps/s", "x Trainer1D, unet1d"], rows),
        ]
    )


def _memory(result: dict[str, Any]) -> str:
    rows = [[entry["of"], entry["name"], f"{entry['bytes'] / 2**20:.0f}"] for entry in result["memory"]]
    how = (
        "allocated on the GPU at most"
        if result["machine"]["device"] != "CPU"
        else "growth of the process's peak resident size"
    )
    return "\n".join([f"Peak memory, each in a process of its own: {how}", "", _grid(["of", "network", "MiB"], rows)])


def _spread(values: dict[str, float]) -> str:
    return f"{_figure(values['median'])} [{_figure(values['low'])}, {_figure(values['high'])}]"


def _figure(value: float) -> str:
    """Three digits without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def plot_bench(result: dict[str, Any], path: Path) -> None:
    """Plot milliseconds against 1 − mean cosine, one point for each bridge, for the middle of the measured sizes.

    The guide's system is a vertical line: its cost is measured, its result is not compared.
    """
    from matplotlib.figure import Figure

    sizes = result["config"]["sizes"]
    pairs = str(sizes[len(sizes) // 2])
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    axes = figure.subplots()
    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in result["sampler"]:
        if entry["fidelity"]:
            of = entry["name"].replace(f", S = {entry['evaluations']}", "")
            kinds.setdefault(f"{of}, from timestep {entry['start_timestep']}", []).append(entry)
    for number, (label, drawn) in enumerate(kinds.items()):
        points = [(e["ms"][pairs]["median"], max(MIN_DISTANCE, 1 - e["fidelity"]["cosine"])) for e in drawn]
        axes.plot(*zip(*points, strict=True), "o", color=f"C{number}", label=label)
        for entry, point in zip(drawn, points, strict=True):
            axes.annotate(str(entry["evaluations"]), point, xytext=(4, 4), textcoords="offset points", fontsize="small")
    guide = result["sampler"][0]
    label = f"{guide['name']}, {guide['evaluations']} evaluations"
    axes.axvline(guide["ms"][pairs]["median"], color="black", linewidth=0.8, linestyle="--", label=label)
    axes.set(
        xscale="log", yscale="log", xlabel=f"ms an image of {pairs} pairs", ylabel="1 − mean cosine to all evaluations"
    )
    axes.set_title(f"{result['machine']['device']}; numbers are evaluations", loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    save_png(figure, path)

"""The picture of a bench: what a result costs against how near it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ezhoi_diffusion.report.png import save_png

CLOSEST = 1e-8  # a logarithm's 0


def plot_bench(result: dict[str, Any], path: Path) -> None:
    """Milliseconds against 1 − mean cosine, both logarithmic; a point for every bridge, its evaluations beside it.

    The guide's system, whose result is not judged, is a line at what it costs, and again in our order of computation. Of the sizes measured the middle one.
    """
    from matplotlib.figure import Figure

    sizes = result["effort"]["sizes"]
    pairs = str(sizes[len(sizes) // 2])
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    axes = figure.subplots()
    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in result["sampler"]:
        if entry["fidelity"]:
            of = entry["name"].replace(f", S = {entry['evaluations']}", "")
            kinds.setdefault(f"{of}, from level {entry['start_timestep']}", []).append(entry)
    for number, (label, drawn) in enumerate(kinds.items()):
        points = [(e["ms"][pairs]["median"], max(CLOSEST, 1 - e["fidelity"]["cosine"])) for e in drawn]
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

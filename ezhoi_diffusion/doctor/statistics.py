"""Statistics of captured features: the guide's first step, and the first thing to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion.features.rows import StoredRows
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.files import check_writable, write_json
from ezhoi_diffusion.report.plots import plot_statistics
from ezhoi_diffusion.report.png import drawn

NUM_COSINES = 1000


def compute_statistics(
    store: FeatureStore, norms: Tensor, statistics: ModalityStatistics, shared: tuple[float, float]
) -> dict[str, Any]:
    """Compute counts, norms and means.

    Args:
        store: Where the features come from.
        norms: Of all its pair features [N], at least one.
        statistics: Their means.
        shared: Mean resultant lengths after the visual mean, and after the text mean.

    Returns:
        JSON. `mean_resultant_length` is what all features share once a mean is subtracted, from 0 to 1.
    """
    counts = torch.tensor([image["rows"] for image in store.images])
    return {
        "pairs": len(norms),
        "images": len(counts),
        "images_without_pairs": int((counts == 0).sum()),
        "pairs_per_image": {"median": float(counts.double().median()), "max": int(counts.max())},
        "split": store.split,
        "dim": statistics.dim,
        "text_features": len(store.text),
        "text_norm": _range(store.text.norm(dim=1)),
        "visual_norm": _range(norms),
        "text_mean_norm": float(statistics.text_mean.norm()),
        "visual_mean_norm": float(statistics.visual_mean.norm()),
        "gap": statistics.gap,
        "mean_resultant_length": {
            "after_visual_mean": shared[0],
            "after_text_mean": shared[1],
        },
    }


def format_statistics(found: dict[str, Any]) -> str:
    """Format the statistics as a table for the terminal."""
    common, counts = found["mean_resultant_length"], found["pairs_per_image"]
    lines = {
        "pairs": f"{found['pairs']} of {found['images']} {found['split']} images, {found['images_without_pairs']} without",
        "pairs per image": f"median {counts['median']:.0f}, max {counts['max']}",
        "text features": f"{found['text_features']} of width {found['dim']}",
        "visual norm": _show(found["visual_norm"]),
        "text norm": _show(found["text_norm"]),
        "norm of the means": f"visual {found['visual_mean_norm']:.3f}, text {found['text_mean_norm']:.3f}",
        "gap": f"{found['gap']:.3f} between the two means",
        "common to all": f"{common['after_visual_mean']:.3f} after the visual mean is subtracted, "
        f"{common['after_text_mean']:.3f} after the text mean (mean resultant length, 0 to 1)",
    }
    return "\n".join(f"         {label:18}{value}" for label, value in lines.items())


def write_statistics(
    store: FeatureStore, features: StoredRows, norms: Tensor, found: dict[str, Any], folder: Path
) -> list[Path]:
    """Write statistics.json, and, where there is text, statistics.png: norms, and cosines of random pairs.

    Returns:
        What was written.
    """
    check_writable(folder)
    written = [folder / "statistics.json", folder / "statistics.png"]
    write_json(written[0], found)
    if len(store.text):
        both = (norms, store.text.norm(dim=1))
        cosines = _draw_cosines(features, store.text)
        if drawn("the statistics", lambda: plot_statistics(both, cosines, written[1])):
            return written
    written[1].unlink(missing_ok=True)  # of an earlier look
    return written[:1]


def _draw_cosines(visual: StoredRows, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines of NUM_COSINES random pairs each: visual-visual, text-text, visual-text."""
    rng = torch.Generator().manual_seed(0)
    (v1, v2), (t1, t2) = (
        normalize(x[torch.randint(len(x), (2 * NUM_COSINES,), generator=rng)], dim=-1).split(NUM_COSINES)
        for x in (visual, text)
    )
    return (v1 * v2).sum(1), (t1 * t2).sum(1), (v1 * t1).sum(1)


def _range(values: Tensor) -> dict[str, float] | None:
    """None where there are no values: imported features may have no text."""
    if len(values) == 0:
        return None
    return {"min": float(values.min()), "median": float(values.median()), "max": float(values.max())}


def _show(values: dict[str, float] | None) -> str:
    return (
        "unknown"
        if values is None
        else f"min {values['min']:.3g}, median {values['median']:.3g}, max {values['max']:.3g}"
    )

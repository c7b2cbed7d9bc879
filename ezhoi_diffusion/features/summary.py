"""What a set of captured features is like, in figures: the guide's first step, and the first thing to look at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.features.statistics import mean_resultant_length, unit
from ezhoi_diffusion.features.store import FeatureStore


def summarize(store: FeatureStore) -> dict[str, Any]:
    """Counts, norms and means of a store, as JSON. Raises FeatureStoreError.

    shared: what all visual rows have in common once a mean is taken off; see `shared_part`.
    """
    statistics = store.statistics()
    counts = torch.tensor([image["rows"] for image in store.images])
    norms = torch.cat([rows.norm(dim=1) for rows in _rows(store)])
    text_norms = store.text.norm(dim=1)
    return {
        "rows": len(store),
        "images": len(counts),
        "images_without_pairs": int((counts == 0).sum()),
        "pairs_per_image": {"median": float(counts.double().median()), "max": int(counts.max())},
        "split": store.split,
        "dim": statistics.dim,
        "text_rows": len(store.text),
        "text_norm": _range(text_norms),
        "visual_norm": _range(norms),
        "text_mean_norm": float(statistics.text_mean.norm()),
        "visual_mean_norm": float(statistics.visual_mean.norm()),
        "gap": statistics.gap,
        "shared": {
            "after_visual_mean": mean_resultant_length(_rows(store), statistics.visual_mean),
            "after_text_mean": mean_resultant_length(_rows(store), statistics.text_mean),
        },
    }


def drawn_cosines(store: FeatureStore, rows: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines between rows drawn at random: visual-visual, text-text and visual-text, `rows` pairs each."""
    source = torch.Generator().manual_seed(seed)
    visual = unit(store.adapter_feat()[torch.randint(len(store), (2 * rows,), generator=source)])
    text = unit(store.text[torch.randint(len(store.text), (2 * rows,), generator=source)])
    (v1, v2), (t1, t2) = visual.split(rows), text.split(rows)
    return (v1 * v2).sum(1), (t1 * t2).sum(1), (v1 * t1).sum(1)


def _rows(store: FeatureStore) -> Iterator[Tensor]:
    return (shard["adapter_feat"] for shard in store.shards())


def _range(values: Tensor) -> dict[str, float]:
    if len(values) == 0:
        return {"min": math.nan, "median": math.nan, "max": math.nan}
    return {"min": float(values.min()), "median": float(values.median()), "max": float(values.max())}

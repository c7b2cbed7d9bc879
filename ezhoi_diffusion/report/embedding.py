"""Maps of both modalities in two dimensions, for the eye."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError

SEED = 0
# Of t-SNE. Of its own 1000, the second half took half of the time, and moved trustworthiness from .916 to .926.
STEPS = 500


class EmbeddingError(EzhoiDiffusionError):
    """A map cannot be made here."""


def require_library(method: str) -> None:
    """Raise EmbeddingError if the library of "tsne" or "umap" is not installed."""
    try:
        import_module({"tsne": "sklearn.manifold", "umap": "umap"}[method])
    except ImportError as error:
        raise EmbeddingError(f"{error}: pip install umap-learn, or use --embedding tsne") from error


def embed(parts: Sequence[Tensor], method: str) -> list[Tensor]:
    """Map all parts, features [N, D] each, to points [N, 2] each, with cosine distances.

    Args:
        parts: Features of each part.
        method: "tsne" or "umap".

    Raises:
        EmbeddingError: The library is not installed, or there are too few features.
    """
    features = torch.cat([*parts]).float().numpy()
    if len(features) < 5:
        raise EmbeddingError(f"a map of {len(features)} features shows nothing: take more images")
    require_library(method)
    if method == "umap":
        reducer: Any = import_module("umap").UMAP(metric="cosine", random_state=SEED)
    else:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(features) - 1) / 3)
        reducer = TSNE(metric="cosine", init="random", max_iter=STEPS, random_state=SEED, perplexity=perplexity)
    return list(torch.from_numpy(reducer.fit_transform(features)).float().split([len(part) for part in parts]))

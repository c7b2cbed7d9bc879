"""Training data from captured features."""

from __future__ import annotations

import torch

from ezhoi_diffusion.diffusion.recipes import Source
from ezhoi_diffusion.features.labels import seen_pairs
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.training.data import TrainingData


def training_data(store: FeatureStore, trained_on: Source) -> TrainingData:
    """The features that a recipe learns from. Visual features are read for "visual" and "pairs" only.

    Raises:
        EzhoiDiffusionError: The store is a capture of test images.
    """
    store.require_training_images("a bridge is trained on")
    provenance = {"fingerprint": store.fingerprint, "features": {"rows": len(store), "images": len(store.images)}}
    visual, image, own_text = store.text[:0], torch.zeros(0, dtype=torch.long), None
    if trained_on == "visual":
        visual, image = store.adapter_feat(), store.image_index()
    elif trained_on == "pairs":
        pairs = seen_pairs(store, held_out=None)
        visual, image, own_text = pairs.visual, pairs.image, pairs.text
    return TrainingData(
        visual, image, store.text, store.statistics(), provenance, store.context, own_text, len(store.images)
    )

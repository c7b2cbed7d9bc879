"""Data of a benchmark: captured or synthetic features and texts, and a bridge trained on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.bench.measure import BenchError
from ezhoi_diffusion.bench.training import silently
from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.features.split import validation_mask
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.rng import generator
from ezhoi_diffusion.testing.synthetic import clip_like_features
from ezhoi_diffusion.training.config import TrainConfig
from ezhoi_diffusion.training.data import TrainingData
from ezhoi_diffusion.training.facts import read_facts
from ezhoi_diffusion.training.trainer import train

DIM, NUM_TEXTS = 512, 212  # ViT-B's width, and EZ-HOI's texts with its unseen-verb split
NUM_FEATURES = 1024
VALIDATE_EVERY = 50
WIDTH_FACTOR = 8  # unet1d halves the width three times


def synthetic(*, dim: int = DIM, texts: int = NUM_TEXTS, features: int = NUM_FEATURES) -> TrainingData:
    """Make features with CLIP's geometry."""
    visual, text = clip_like_features(features, texts, dim)
    return _bench_data(visual, text, ModalityStatistics.compute([visual], text), "synthetic, in CLIP's geometry")


def captured(store: FeatureStore) -> TrainingData:
    """Take features of a test split, or of the held-out images of a train split.

    Raises:
        BenchError: There are none, or the guide's network cannot take their width.
    """
    if store.text.shape[1] % WIDTH_FACTOR:
        raise BenchError(
            f"{store.folder} holds features of width {store.text.shape[1]}, and the guide's unet1d, the reference, takes "
            f"multiples of {WIDTH_FACTOR}"
        )
    held_out = torch.ones(len(store.images), dtype=torch.bool)
    if store.split == "train":
        try:
            held_out = validation_mask(len(store.images))
        except ValueError as error:
            raise BenchError(f"{store.folder} has too few images: {error}. Capture more") from error
    chosen, seen, parts = held_out[store.image_index()], 0, [store.text[:0]]
    for shard in store.shards():
        features = shard["adapter_feat"]
        parts.append(features[chosen[seen : seen + len(features)]])
        seen += len(features)
        if sum(map(len, parts)) >= NUM_FEATURES:
            break
    found = torch.cat(parts)
    if len(found) == 0:
        raise BenchError(
            f"{store.folder} has no pair on a held-out image, so there is nothing to measure: capture more"
        )
    # mixed, because only a part of them may be compared, and it has to be of many images
    mixed = found[torch.randperm(len(found), generator=generator(0, "bench"))[:NUM_FEATURES]]
    return _bench_data(mixed, store.text, store.statistics(), f"{store.folder}, {store.split} split")


def _bench_data(visual: Tensor, text: Tensor, statistics: ModalityStatistics, origin: str) -> TrainingData:
    """The default recipe learns from the texts alone, so visual features are free to be measured on."""
    return TrainingData(visual, torch.zeros(len(visual), dtype=torch.long), text, statistics, {"origin": origin})


def trained(
    data: TrainingData, steps: int, registry: Components, device: torch.device
) -> tuple[DiffusionBridge, DiffusionBridge, dict[str, Any]]:
    """Train the default bridge for `steps` steps on the texts, and fit the closed-form Gaussian to them.

    Returns:
        The bridge, the Gaussian, and as JSON: the Gaussian's loss on held-out texts (`baseline_loss`), the lowest loss of the
        network there, and when it was first below the Gaussian's. That is known to `VALIDATE_EVERY` steps; its seconds are
        the same share of the training's.
    """
    config = TrainConfig(train_steps=steps, val_every=min(VALIDATE_EVERY, steps), checkpoint_every=steps)
    bridges, facts = [], []
    with TemporaryDirectory() as folder, silently():
        for denoiser in (config.denoiser, "gaussian"):
            out = train(data, replace(config, denoiser=denoiser), Path(folder) / denoiser, registry=registry)
            facts.append(read_facts(out))
            bridges.append(DiffusionBridge.from_pretrained(out, registry=registry, device=device))
    (bridge, gaussian), (own, exact) = bridges, facts
    losses = {record["step"]: record["val_loss"] for record in own["history"] if "val_loss" in record}
    reached = next((step for step, loss in losses.items() if loss < exact["val_loss"]), None)
    return (
        bridge,
        gaussian,
        {
            "baseline_loss": exact["val_loss"],
            "val_loss": min(losses.values()),
            "reached_at_step": reached,
            "reached_after_seconds": None if reached is None else own["seconds"] * reached / steps,
            "steps": steps,
            "seconds": own["seconds"],
        },
    )


def require_fit(bridge: DiffusionBridge, folder: str, data: TrainingData) -> None:
    """Raise BenchError where a bridge is for features of another width."""
    if bridge.config.dim != data.statistics.dim:
        raise BenchError(
            f"the bridge in {folder} is for features of width {bridge.config.dim}, and those of "
            f"{data.provenance['origin']} have {data.statistics.dim}: give features and a bridge of the same backbone"
        )

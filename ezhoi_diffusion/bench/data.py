"""Data of a benchmark: captured or synthetic features and texts, and a bridge trained on them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from ezhoi_diffusion.training.distillation import distill
from ezhoi_diffusion.training.trainer import train

DIM, NUM_TEXTS = 512, 212  # ViT-B's width, and EZ-HOI's texts with its unseen-verb split
NUM_FEATURES, NUM_LEARNABLE = 1024, 4096
VALIDATE_EVERY = 50
WIDTH_FACTOR = 8  # unet1d halves the width three times


@dataclass(frozen=True, eq=False)
class BenchData:
    """The features that are measured on.

    Visual features [N, D] that nothing has learned from, others to learn from [M, D], text features [N_sel, D], the means of
    both sides, and where they come from.
    """

    features: Tensor
    learnable: Tensor
    text: Tensor
    statistics: ModalityStatistics
    origin: str

    @property
    def texts_only(self) -> TrainingData:
        """Training data of the default recipe, which learns from texts alone."""
        return TrainingData(self.features[:0], torch.zeros(0, dtype=torch.long), self.text, self.statistics)


def synthetic(*, dim: int = DIM, texts: int = NUM_TEXTS, features: int = NUM_FEATURES) -> BenchData:
    """Make features with CLIP's geometry."""
    visual, text = clip_like_features(features + NUM_LEARNABLE, texts, dim)
    statistics = ModalityStatistics.compute([visual], text)
    return BenchData(visual[:features], visual[features:], text, statistics, "synthetic, in CLIP's geometry")


def captured(store: FeatureStore) -> BenchData:
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
    chosen, seen = held_out[store.image_index()], 0
    parts: tuple[list[Tensor], list[Tensor]] = [], []
    for shard in store.shards():
        rows = shard["adapter_feat"]
        mine = chosen[seen : seen + len(rows)]
        seen += len(rows)
        for part, these in zip(parts, (mine, ~mine), strict=True):
            part.append(rows[these])
        if sum(map(len, parts[0])) >= NUM_FEATURES and (
            store.split == "test" or sum(map(len, parts[1])) >= NUM_LEARNABLE
        ):
            break
    found, others = (torch.cat([store.text[:0], *part]) for part in parts)
    if len(found) == 0:
        raise BenchError(
            f"{store.folder} has no pair on a held-out image, so there is nothing to measure: capture more"
        )
    mixed = torch.randperm(len(found), generator=generator(0, "bench"))[
        :NUM_FEATURES
    ]  # so that a part of them is of many images
    return BenchData(
        found[mixed], others[:NUM_LEARNABLE], store.text, store.statistics(), f"{store.folder}, {store.split} split"
    )


@dataclass(frozen=True, eq=False)
class Training:
    """The default bridge and the closed-form Gaussian, trained on the same texts.

    Attributes:
        bridge: The default bridge.
        gaussian: The closed-form Gaussian.
        baseline_loss: The Gaussian's loss on held-out texts.
        val_loss: The lowest loss of the network there.
        reached: Step and seconds at which the network was first below `baseline_loss`.
        steps: Steps of the training.
        seconds: Its duration.
    """

    bridge: DiffusionBridge
    gaussian: DiffusionBridge
    baseline_loss: float
    val_loss: float
    reached: tuple[int, float] | None
    steps: int
    seconds: float

    def facts(self) -> dict[str, Any]:
        """Describe the training as JSON."""
        step, seconds = self.reached or (None, None)
        return {
            "baseline_loss": self.baseline_loss,
            "val_loss": self.val_loss,
            "reached_at_step": step,
            "reached_after_seconds": seconds,
            "steps": self.steps,
            "seconds": self.seconds,
        }


def trained(
    data: BenchData, steps: int, registry: Components, device: torch.device, on_step: Callable[[int], None]
) -> Training:
    """Train the default bridge for `steps` steps on the texts, and fit the Gaussian to them."""
    every = min(VALIDATE_EVERY, steps)
    config = replace(TrainConfig(), train_steps=steps, val_every=every, checkpoint_every=steps)
    stamps = [0.0]

    def note(step: int) -> None:
        stamps.append(time.perf_counter() - began)
        on_step(step)

    with TemporaryDirectory() as folder, silently():
        fitted = train(
            data.texts_only, replace(config, denoiser="gaussian"), Path(folder) / "gaussian", registry=registry
        )
        began = time.perf_counter()
        out = train(data.texts_only, config, Path(folder) / "bridge", registry=registry, on_step=note)
        baseline_loss = json.loads((fitted / "training.json").read_text())["val_loss"]
        history = json.loads((out / "training.json").read_text())["history"]
        gaussian, bridge = (
            DiffusionBridge.from_pretrained(path, registry=registry, device=device) for path in (fitted, out)
        )
    validated = [(record["step"], record["val_loss"]) for record in history if "val_loss" in record]
    first = next((step for step, loss in validated if loss < baseline_loss), None)
    reached = None if first is None else (first, stamps[first])
    return Training(bridge, gaussian, baseline_loss, min(loss for _, loss in validated), reached, steps, stamps[-1])


def student_of(bridge: DiffusionBridge, data: BenchData, steps: int, device: torch.device) -> DiffusionBridge | None:
    """Distil a student. Returns None where one evaluation is used already, or there are no features to learn from."""
    if (
        bridge.config.student_of is not None
        or bridge.config.recipe.num_steps == 1
        or bridge.config.denoiser == "unet1d"
    ):
        return None  # unet1d would take minutes an evaluation
    if min(len(data.learnable), len(data.features)) < 2:
        return None
    few = data.features[:2]  # validation is not needed here: nearness compares the student with the others
    with silently():
        student, _ = distill(bridge, data.learnable, few, data.text, train_steps=steps, device=device)
    return student.to(device)


def require_fit(bridge: DiffusionBridge, folder: str, data: BenchData) -> None:
    """Raise BenchError where a bridge is for features of another width."""
    if bridge.config.dim != data.text.shape[1]:
        raise BenchError(
            f"the bridge in {folder} is for features of width {bridge.config.dim}, and those of {data.origin} have "
            f"{data.text.shape[1]}: give features and a bridge of the same backbone"
        )

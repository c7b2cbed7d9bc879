"""Small trainings on features of few dimensions."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.training.trainer import TrainConfig, TrainingData

DIM = 32
QUICK = TrainConfig(
    train_steps=12,
    batch_size=16,
    val_every=4,
    checkpoint_every=4,
    denoiser_options={"width": 16, "depth": 1},
)


def low_rank(texts: int = 60, visuals: int = 90, dim: int = DIM, rank: int = 3) -> TrainingData:
    """Features near a plane of few dimensions; visual features and texts have their own offset."""
    generator = torch.Generator().manual_seed(0)
    plane, offset = torch.randn(rank, dim, generator=generator), torch.randn(dim, generator=generator)
    text = torch.randn(texts, rank, generator=generator) @ plane + 2 * offset
    visual = 9 * torch.randn(visuals, rank, generator=generator) @ plane - 20 * offset
    image = torch.arange(visuals) // 6
    statistics = ModalityStatistics.compute([visual], text)
    return TrainingData(visual, image, text, statistics, {"run": "test"}, {"ctx": torch.ones(2)})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a bridge, and all tensors of the newest checkpoint of each phase beside it."""
    found = load_file(folder / "model.safetensors")
    for phase in (".", "refit"):
        for path in sorted((folder / "checkpoints" / phase).glob("step-*"))[-1:]:
            for file in path.glob("*.safetensors"):
                found.update({f"{phase} {file.stem}: {name}": x for name, x in load_file(file).items()})
    return found


def facts(out: Path) -> dict[str, Any]:
    """Read training.json."""
    return json.loads((out / "training.json").read_text())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stop(Exception):
    """Ends a training as a crash does."""


def stop_at(step):
    """Return an `on_step` that raises Stop."""

    def on_step(done):
        if done == step:
            raise Stop

    return on_step


def asked_to_end_at(step):
    """Return an `on_step` that sends SIGTERM."""

    def on_step(done):
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


# A network that soon memorises its few texts: the validation loss turns and rises.
OVERFIT = replace(
    QUICK,
    train_steps=60,
    val_every=2,
    checkpoint_every=7,
    learning_rate=1e-2,
    lr_schedule="cosine",
    warmup_steps=3,
    weight_decay=0.1,
    ema_decay=0.5,
    ema_update_every=2,
    patience=3,
    denoiser_options={"width": 32, "depth": 1},
)


def few():
    """Return data of ten texts."""
    return low_rank(texts=10)

"""Small trainings on rows of few dimensions."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

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
    """Embeddings near a plane of few dimensions, both sides with their own offset."""
    generator = torch.Generator().manual_seed(0)
    plane, offset = torch.randn(rank, dim, generator=generator), torch.randn(dim, generator=generator)
    text = torch.randn(texts, rank, generator=generator) @ plane + 2 * offset
    visual = 9 * torch.randn(visuals, rank, generator=generator) @ plane - 20 * offset
    image = torch.arange(visuals) // 6
    statistics = ModalityStatistics.of([visual], text)
    return TrainingData(visual, image, text, statistics, {"host": "test"}, {"ctx": torch.ones(2)})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """A bridge's, which may be those of an early step, and with them all that the newest checkpoint beside it holds."""
    found = load_file(folder / "model.safetensors")
    for path in sorted((folder / "checkpoints").glob("step-*"))[-1:]:
        for file in path.glob("*.safetensors"):
            found.update({f"{file.stem} at the end, {name}": x for name, x in load_file(file).items()})
    return found


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stop(Exception):
    pass


def stop_at(step):
    def on_step(done):
        if done == step:
            raise Stop

    return on_step


def asked_to_end_at(step):
    def on_step(done):
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


# A network that soon knows its few texts by heart: the validation loss turns and rises.
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
    return low_rank(texts=10)

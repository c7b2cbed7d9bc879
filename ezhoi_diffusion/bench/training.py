"""Training steps a second, in this package and in the trainer of the guide's system."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ezhoi_diffusion.bench.measure import now, spread
from ezhoi_diffusion.diffusion.bridge import BridgeConfig, build_denoiser
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.diffusion.normalization import normalize, rescale
from ezhoi_diffusion.errors import Interrupted
from ezhoi_diffusion.training.config import TrainConfig
from ezhoi_diffusion.training.data import TrainingData
from ezhoi_diffusion.training.trainer import train

MIN_TURN = 1.0  # seconds of each case in every round, or one step where that takes longer
FOREVER = 10_000_000
EPOCH = 1 << 16  # samples in the published trainer's data set, so that no epoch ends while it is timed
# Untimed steps at the start of a turn, and steps timed together: to synchronize a GPU after every step would slow it.
WARM_UP = {"cpu": 1, "cuda": 20}
TOGETHER = {"cpu": 1, "cuda": 10}


class _Enough(Exception):
    """Ends a training after its turn."""


@dataclass(frozen=True)
class TrainerCase:
    """A training to measure: a network, in this package's loop or in denoising-diffusion-pytorch's Trainer1D."""

    denoiser: str
    published: bool

    @property
    def name(self) -> str:
        """Name in the table."""
        return f"{'Trainer1D' if self.published else 'ours'}, {self.denoiser}"


GUIDE = TrainerCase("unet1d", published=True)
TRAINER_CASES = (
    TrainerCase("mlp", published=False),
    TrainerCase("mlp", published=True),
    GUIDE,
    TrainerCase("unet1d", published=False),
)


def speed(
    data: TrainingData,
    *,
    batch: int,
    seconds: float,
    rounds: int,
    registry: Components,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Measure the steps a second of every trainer at this batch, and their ratio to the guide's.

    The trainers take turns until `seconds` are over, and at least `rounds` times.
    """
    taken: dict[TrainerCase, list[float]] = {trainer_case: [] for trainer_case in TRAINER_CASES}
    end, done = time.perf_counter() + seconds, 0
    with ExitStack() as stack:
        turns = {
            trainer_case: stack.enter_context(training(trainer_case, data, batch, registry))
            for trainer_case in TRAINER_CASES
        }
        while done < rounds or time.perf_counter() < end:
            for trainer_case, turn in turns.items():
                taken[trainer_case] += _timed(turn, device)
            done += 1
    results: list[dict[str, Any]] = []
    for trainer_case, samples in taken.items():
        rates = spread([1 / second for second in samples])
        results.append(
            {"name": trainer_case.name, "denoiser": trainer_case.denoiser, "batch": batch, "steps_per_second": rates}
        )
    guides = next(r["steps_per_second"]["median"] for r in results if r["name"] == GUIDE.name)
    return [{**r, "ratio": r["steps_per_second"]["median"] / guides} for r in results]


@contextmanager
def silently() -> Iterator[None]:
    """Hide a training's output and warnings. Ctrl-C ends the whole benchmark: there is nothing to resume."""
    with redirect_stderr(StringIO()), redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Interrupted as error:
            raise KeyboardInterrupt from error


Turn = Callable[[Callable[[], None]], None]
"""Continues a training and calls the argument after every step, until that raises."""


@contextmanager
def training(trainer_case: TrainerCase, data: TrainingData, batch: int, registry: Components) -> Iterator[Turn]:
    """Yield a training that runs silently in turns, in a temporary folder."""
    config = replace(
        TrainConfig(),
        denoiser=trainer_case.denoiser,
        batch_size=batch,
        train_steps=FOREVER,
        val_every=FOREVER,
        checkpoint_every=FOREVER,
    )
    with TemporaryDirectory() as folder:
        turns = (
            _published(data, config, Path(folder), registry)
            if trainer_case.published
            else _ours(data, config, Path(folder), registry)
        )

        def turn(after_step: Callable[[], None]) -> None:
            with silently(), suppress(_Enough):
                turns(after_step)

        yield turn


def _ours(data: TrainingData, config: TrainConfig, folder: Path, registry: Components) -> Turn:
    begun: list[Path] = []

    def turn(after_step: Callable[[], None]) -> None:  # a new training each time
        begun.append(folder / str(len(begun)))
        train(data, config, begun[-1], registry=registry, on_step=lambda _: after_step())

    return turn


def _published(data: TrainingData, config: TrainConfig, folder: Path, registry: Components) -> Turn:
    """Make Trainer1D as it is published: a data loader with a worker for every core, the loss fetched in every step."""
    from denoising_diffusion_pytorch import GaussianDiffusion1D, Trainer1D

    dim, recipe = data.text.shape[1], config.recipe
    with torch.random.fork_rng(devices=[]):
        network = build_denoiser(BridgeConfig(dim, recipe, config.denoiser), registry)
    diffusion = GaussianDiffusion1D(
        OnChannels(network, recipe.scale_factor),
        seq_length=dim,
        objective="pred_x0",
        timesteps=config.num_timesteps,
        auto_normalize=False,
    )
    trainer = Trainer1D(
        diffusion,
        RepeatedTexts(normalize(data.text, data.statistics.text_mean, recipe.scale_factor)[0]),
        train_batch_size=config.batch_size,
        train_lr=config.learning_rate,
        train_num_steps=FOREVER,
        save_and_sample_every=FOREVER,
        results_folder=str(folder),
    )

    def turn(after_step: Callable[[], None]) -> None:
        hook = trainer.opt.optimizer.register_step_post_hook(lambda *_: after_step())
        try:
            trainer.train()
        finally:
            hook.remove()

    return turn


class OnChannels(nn.Module):
    """Adapter for GaussianDiffusion1D: passes features [N, 1, D] to a network at norm `scale`."""

    channels, self_condition = 1, False

    def __init__(self, network: nn.Module, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        """Predict [N, 1, D] at timesteps t [N]."""
        output: Tensor = self.network(rescale(x.squeeze(1), self.scale), t)
        return output.unsqueeze(1)


class RepeatedTexts(Dataset[Tensor]):
    """Text features [N, D] repeated, each as [1, D]."""

    def __init__(self, texts: Tensor) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return max(EPOCH, len(self.texts))

    def __getitem__(self, index: int) -> Tensor:
        return self.texts[index % len(self.texts)].unsqueeze(0).clone()


def _timed(turn: Turn, device: torch.device) -> list[float]:
    """Seconds of each step of one turn."""
    warm_up, together = WARM_UP[device.type], TOGETHER[device.type]
    stamps: list[float] = []
    steps = 0

    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps < warm_up or (steps - warm_up) % together:
            return
        stamps.append(now(device))
        if len(stamps) > 1 and stamps[-1] - stamps[0] >= MIN_TURN:
            raise _Enough

    turn(after_step)
    return [(b - a) / together for a, b in pairwise(stamps)]


def take_steps(turn: Turn, count: int) -> None:
    """Take `count` steps."""
    left = count

    def after_step() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise _Enough

    turn(after_step)

"""Training steps a second, in this package and in the trainer of the guide's system."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from io import StringIO
from itertools import count, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from ezhoi_diffusion.bench.measure import now, peak_growth, spread, take_turns
from ezhoi_diffusion.diffusion.bridge import build_denoiser
from ezhoi_diffusion.diffusion.components import Components, components
from ezhoi_diffusion.diffusion.normalization import normalize, rescale
from ezhoi_diffusion.errors import Interrupted
from ezhoi_diffusion.plugins import PluginManager
from ezhoi_diffusion.training.config import TrainConfig
from ezhoi_diffusion.training.data import TrainingData
from ezhoi_diffusion.training.trainer import train

MIN_TURN = 1.0  # seconds of each trainer in every round, or one step where that takes longer
FOREVER = 10_000_000
EPOCH = 1 << 16  # samples in the published trainer's data set, so that no epoch ends while it is timed
# Untimed steps at the start of a turn, and steps timed together: to synchronize a GPU after every step would slow it.
WARM_UP = {"cpu": 1, "cuda": 20}
TOGETHER = {"cpu": 1, "cuda": 10}
GUIDE = "Trainer1D, unet1d"
# Trainers by name: the network, and whether it is trained by denoising-diffusion-pytorch's Trainer1D or by this package.
TRAINERS = {
    "ours, mlp": ("mlp", False),
    "Trainer1D, mlp": ("mlp", True),
    GUIDE: ("unet1d", True),
    "ours, unet1d": ("unet1d", False),
}

Run = Callable[[Callable[[], None]], None]
"""Runs a training and calls the argument after every step, until that raises."""


class _Enough(Exception):
    """Ends a training after its turn."""


def speed(
    data: TrainingData, *, batch: int, seconds: float, rounds: int, registry: Components, device: torch.device
) -> list[dict[str, Any]]:
    """Measure the steps a second of every trainer at this batch, and their ratio to the guide's.

    The trainers take turns until `seconds` are over, and at least `rounds` times. Every turn is a new training.
    """
    runs = {name: partial(run_training, name, data, batch, registry) for name in TRAINERS}
    turns = {name: partial(step_seconds, run, device, MIN_TURN) for name, run in runs.items()}
    samples = take_turns(turns, seconds=seconds, rounds=rounds)
    rates = {name: spread([1 / second for second in taken]) for name, taken in samples.items()}
    return [
        {"name": name, "steps_per_second": rate, "ratio": rate["median"] / rates[GUIDE]["median"]}
        for name, rate in rates.items()
    ]


def step_seconds(run: Run, device: torch.device, seconds: float) -> list[float]:
    """Seconds of each step of a training that goes on for `seconds`, and for two steps at least."""
    warm_up, together = WARM_UP[device.type], TOGETHER[device.type]
    stamps: list[float] = []
    steps = count(1)

    def after_step() -> None:
        step = next(steps)
        if step < warm_up or (step - warm_up) % together:
            return
        stamps.append(now(device))
        if len(stamps) > 1 and stamps[-1] - stamps[0] >= seconds:
            raise _Enough

    with suppress(_Enough):
        run(after_step)
    return [(b - a) / together for a, b in pairwise(stamps)]


@contextmanager
def silently() -> Iterator[None]:
    """Hide a training's output and warnings. Ctrl-C ends the whole benchmark: there is nothing to resume."""
    with redirect_stderr(StringIO()), redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Interrupted as error:
            raise KeyboardInterrupt from error


def run_training(
    name: str, data: TrainingData, batch: int, registry: Components, after_step: Callable[[], None]
) -> None:
    """Run a training silently in a temporary folder, until `after_step` raises."""
    denoiser, published = TRAINERS[name]
    config = TrainConfig(
        denoiser=denoiser,
        batch_size=batch,
        train_steps=FOREVER,
        val_every=FOREVER,
        checkpoint_every=FOREVER,
    )
    with TemporaryDirectory() as folder, silently():
        if published:
            _run_published(data, config, folder, registry, after_step)
        else:
            train(data, config, Path(folder) / "ours", registry=registry, on_step=lambda _: after_step())


def _run_published(
    data: TrainingData, config: TrainConfig, folder: str, registry: Components, after_step: Callable[[], None]
) -> None:
    """Run Trainer1D as it is published: a data loader with a worker for every core, the loss fetched in every step."""
    from denoising_diffusion_pytorch import Dataset1D, GaussianDiffusion1D, Trainer1D

    dim, scale = data.statistics.dim, config.recipe.scale_factor
    with torch.random.fork_rng(devices=[]):
        network = build_denoiser(config.bridge_config(dim), registry)
    texts = Dataset1D(normalize(data.text, data.statistics.text_mean, scale)[0].unsqueeze(1))
    trainer = Trainer1D(
        GaussianDiffusion1D(
            OnChannels(network, scale),
            seq_length=dim,
            objective="pred_x0",
            timesteps=config.num_timesteps,
            auto_normalize=False,
        ),
        ConcatDataset([texts] * -(-EPOCH // len(texts))),
        train_batch_size=config.batch_size,
        train_lr=config.learning_rate,
        train_num_steps=FOREVER,
        save_and_sample_every=FOREVER,
        results_folder=folder,
    )
    trainer.opt.optimizer.register_step_post_hook(lambda *_: after_step())
    try:
        trainer.train()
    finally:
        trainer.dl.close()  # ends the workers


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


def memory(name: str, data: TrainingData, batch: int) -> int:
    """Bytes that a training adds to this process, which has to be a new one, without a data loader's workers."""
    import accelerate
    import denoising_diffusion_pytorch  # noqa: F401, to load modules before measuring

    device = accelerate.Accelerator().device
    run = partial(run_training, name, data, batch, components(PluginManager()))
    # two steps: the first one makes the optimizer's state
    return peak_growth(lambda: step_seconds(run, device, seconds=0), device)

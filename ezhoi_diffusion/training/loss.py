"""The training loss, and the fixed batch on which it is watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ezhoi_diffusion.diffusion.normalization import rescale
from ezhoi_diffusion.diffusion.schedule import Objective, Schedule, isotropic_estimate
from ezhoi_diffusion.rng import generator
from ezhoi_diffusion.training.config import TrainConfig
from ezhoi_diffusion.training.data import Rows

RANGES = 5
ROWS_PER_RANGE = 100

Predict = Callable[[Tensor, Tensor], Tensor]


def denoising_loss(
    predict: Predict,
    z: Tensor,
    t: Tensor,
    noise: Tensor,
    schedule: Schedule,
    objective: Objective,
    scale_factor: float,
    *,
    paired: bool = False,
) -> Tensor:
    """Mean over rows of weight_t · mean over D of (prediction − target)², as Diffusion Bridge trains it.

    z, noise [N, D] lie on the network's device, t [N] on the CPU. The network sees x_t at norm `scale`; the
    target belongs to x_t as it was. paired: every level weighs the same, because a feature enters at the last one,
    whose signal-to-noise ratio is 0.
    """
    x = rescale(schedule.q_sample(z, t, noise), scale_factor)
    prediction = predict(x, t.to(z.device, non_blocking=True)).float()
    error = (prediction - schedule.target(objective, z, t, noise)).square().mean(dim=1)
    return error.mean() if paired else (schedule.loss_weight(objective, t).to(error) * error).mean()


@dataclass(frozen=True, eq=False)
class Validation:
    """Held-out rows with noise and levels fixed for the whole run: five ranges of levels, from low noise to high,
    with the same number of rows each and levels evenly spread."""

    z: Tensor
    t: Tensor
    noise: Tensor
    schedule: Schedule
    objective: Objective
    scale_factor: float
    paired: bool

    @classmethod
    def of(cls, rows: Rows, schedule: Schedule, config: TrainConfig) -> Validation:
        """500 (row, level) pairs: few rows are repeated at several levels, of many a sample is taken."""
        source = generator(config.seed, "validation")
        shuffled = rows.validation[torch.randperm(len(rows.validation), generator=source)]
        pairs = RANGES * ROWS_PER_RANGE
        numbers = shuffled.repeat(-(-pairs // len(shuffled)))[:pairs]
        levels = (torch.arange(pairs) * schedule.timesteps) // pairs
        t = torch.cat([part[torch.randperm(len(part), generator=source)] for part in levels.split(ROWS_PER_RANGE)])
        noise = rows.noise(numbers, torch.randn(len(numbers), rows.source.shape[1], generator=source))
        return cls(rows[numbers], t, noise, schedule, config.objective, rows.scale_factor, rows.paired)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The lowest and the highest level of every range."""
        return [(int(part.min()), int(part.max())) for part in self.t.split(ROWS_PER_RANGE)]

    @torch.no_grad()
    def losses(self, predict: Predict, device: torch.device | str = "cpu") -> list[float]:
        """The loss of `predict` in every range. Their mean is the loss on all of it."""
        parts = zip(*(x.split(ROWS_PER_RANGE) for x in (self.z, self.t, self.noise)), strict=True)
        return [
            float(
                denoising_loss(
                    predict,
                    z.to(device),
                    t,
                    noise.to(device),
                    self.schedule,
                    self.objective,
                    self.scale_factor,
                    paired=self.paired,
                )
            )
            for z, t, noise in parts
        ]

    def bar(self) -> list[float]:
        """The losses of the isotropic Wiener estimate, which knows no data: a network has to be below it."""
        skip, _ = isotropic_estimate(self.schedule, self.objective, self.z.shape[1], self.scale_factor)
        return self.losses(lambda x, t: skip[t].to(x).unsqueeze(1) * x)

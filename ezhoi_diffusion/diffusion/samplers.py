"""Samplers: plain functions from a centred embedding to its bridged version."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ezhoi_diffusion.diffusion.normalization import rescale
from ezhoi_diffusion.diffusion.schedule import Schedule
from ezhoi_diffusion.registry import Registry

PredictX0 = Callable[[Tensor, int], Tensor]
"""(x [N, D] of norm `scale`, level) → estimate of x0 [N, D]."""


class Sampler(Protocol):
    """What `register_samplers` takes: z [N, D] enters un-noised at level start_step − 1."""

    def __call__(
        self, predict: PredictX0, z: Tensor, *, schedule: Schedule, steps: int, start_step: int, scale: float
    ) -> Tensor:
        """The bridged rows [N, D], of any norm, after `steps` evaluations of `predict`."""


def grid(steps: int, start_step: int) -> list[int]:
    """The steps + 1 levels from start_step − 1 down to −1: trunc(linspace(−1, start_step − 1)), reversed.

    grid(5, 600) = 599 479 359 239 119 −1. Raises ValueError where a level would repeat. In whole numbers,
    because in floats the truncation may drop a level by one.
    """
    if not 1 <= steps <= start_step:
        raise ValueError(f"need 1 <= steps <= start_step, not steps={steps}, start_step={start_step}")
    return [i * start_step // steps - 1 for i in range(steps, -1, -1)]


def ddim(predict: PredictX0, z: Tensor, *, schedule: Schedule, steps: int, start_step: int, scale: float) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, η = 0), the input renormalised before every evaluation.

    The published step, ε = (x/√ᾱ_t − x̂)/√(1/ᾱ_t − 1) and x ← √ᾱ_t'·x̂ + √(1−ᾱ_t')·ε, collected by x and x̂.
    Raises ValueError for steps > start_step and for start_step > T.
    """
    if start_step > schedule.timesteps:
        raise ValueError(f"start_step={start_step} lies beyond the schedule's {schedule.timesteps} levels")
    levels = grid(steps, start_step)
    alpha_bar = schedule.alphas_cumprod.tolist()
    x = z
    for t, t_next in pairwise(levels):
        x = rescale(x, scale)
        x0 = predict(x, t)
        if t_next < 0:
            x = x0
            break
        ratio = math.sqrt((1 - alpha_bar[t_next]) / (1 - alpha_bar[t]))
        x = ratio * x + (math.sqrt(alpha_bar[t_next]) - ratio * math.sqrt(alpha_bar[t])) * x0
    return x


def published(
    predict: PredictX0, z: Tensor, *, schedule: Schedule, steps: int, start_step: int, scale: float
) -> Tensor:
    """`ddim` as the published code computes it, to reproduce it to the last digits: ε explicit, table and grid in float32.

    1 − ᾱ loses three digits there at the low levels, which an untrained network was seen to turn into differences of 2e-5
    in unit rows. Raises ValueError as `ddim` does.
    """
    if start_step > schedule.timesteps:
        raise ValueError(f"start_step={start_step} lies beyond the schedule's {schedule.timesteps} levels")
    exact = schedule.alphas_cumprod
    alpha_bar, recip, recipm1 = exact.to(z), (1 / exact).sqrt().to(z), (1 / exact - 1).sqrt().to(z)
    grid(steps, start_step)  # refuses what would repeat levels
    # the published grid: in float32 the truncation drops some levels by one, e.g. for (50, 60)
    levels = torch.linspace(-1, start_step - 1, steps + 1).int().flip(0).tolist()
    x = z
    for t, t_next in pairwise(levels):
        x = rescale(x, scale)
        x0 = predict(x, t)
        if t_next < 0:
            x = x0
            break
        noise = (recip[t] * x - x0) / recipm1[t]
        x = alpha_bar[t_next].sqrt() * x0 + (1 - alpha_bar[t_next]).sqrt() * noise
    return x


def samplers() -> Registry[Sampler]:
    """A fresh registry of the samplers that ship."""
    return Registry("sampler", {"ddim": ddim, "published": published})

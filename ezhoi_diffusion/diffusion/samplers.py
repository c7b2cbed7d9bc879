"""Samplers: plain functions from a centred embedding to its bridged version."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ezhoi_diffusion.diffusion.normalization import rescale
from ezhoi_diffusion.diffusion.recipes import Spacing
from ezhoi_diffusion.diffusion.schedule import Schedule
from ezhoi_diffusion.registry import Registry

POWERS = {"linear": 1, "quadratic": 2, "cubic": 3}

PredictX0 = Callable[[Tensor, int], Tensor]
"""(x [N, D] of norm `scale`, level) → estimate of x0 [N, D]."""


class Sampler(Protocol):
    """What `register_samplers` takes: z [N, D] enters un-noised at the first of the levels."""

    def __call__(
        self, predict: PredictX0, z: Tensor, *, schedule: Schedule, levels: Sequence[int], scale_factor: float
    ) -> Tensor:
        """The bridged rows [N, D], of any norm, after an evaluation of `predict` at every level but the last, −1."""


@functools.lru_cache(maxsize=1024)
def make_timesteps(spacing: Spacing, num_steps: int, start_timestep: int) -> tuple[int, ...]:
    """The steps + 1 levels from start_timestep − 1 down to −1, none of them twice.

    linear: evenly spaced, 599 479 359 239 119 −1 for (5, 600), in whole numbers, because in floats the truncation may drop a
    level by one. published: trunc(linspace(−1, start_timestep − 1)) in float32, as the published code has it, which drops some
    by one, e.g. for (50, 60). quadratic, cubic: start_timestep·(i/steps)^p − 1, denser near the end, where rows are decided;
    levels that fall together are moved apart. Raises ValueError where steps exceed start_timestep.
    """
    if not 1 <= num_steps <= start_timestep:
        raise ValueError(
            f"need 1 <= num_steps <= start_timestep, not steps={num_steps}, start_timestep={start_timestep}"
        )
    if spacing == "published":
        return tuple(torch.linspace(-1, start_timestep - 1, num_steps + 1).int().flip(0).tolist())
    power = POWERS[spacing]
    levels = [-1]
    for i in range(1, num_steps + 1):  # in whole numbers, so no rounding depends on the machine
        levels.append(max(start_timestep * i**power // num_steps**power - 1, levels[-1] + 1))
    return tuple(levels[::-1])


def ddim(predict: PredictX0, z: Tensor, *, schedule: Schedule, levels: Sequence[int], scale_factor: float) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, η = 0), the input renormalised before every evaluation.

    The published step, ε = (x/√ᾱ_t − x̂)/√(1/ᾱ_t − 1) and x ← √ᾱ_t'·x̂ + √(1−ᾱ_t')·ε, collected by x and x̂.
    """
    alpha_bar = schedule.alphas_cumprod.tolist()
    x = z
    for t, t_next in pairwise(levels):
        x = rescale(x, scale_factor)
        x0 = predict(x, t)
        if t_next < 0:
            x = x0
            break
        ratio = math.sqrt((1 - alpha_bar[t_next]) / (1 - alpha_bar[t]))
        x = ratio * x + (math.sqrt(alpha_bar[t_next]) - ratio * math.sqrt(alpha_bar[t])) * x0
    return x


def published(
    predict: PredictX0, z: Tensor, *, schedule: Schedule, levels: Sequence[int], scale_factor: float
) -> Tensor:
    """`ddim` as the published code computes it, to reproduce it to the last digits: ε explicit, the table in float32.

    1 − ᾱ loses three digits there at the low levels, which an untrained network was seen to turn into differences of 2e-5
    in unit rows. The grid of the same name belongs to it.
    """
    signal, sigma, recip, recipm1 = _published_tables(schedule, z.dtype)
    x = z
    for t, t_next in pairwise(levels):
        x = rescale(x, scale_factor)
        x0 = predict(x, t)
        if t_next < 0:
            x = x0
            break
        noise = (recip[t] * x - x0) / recipm1[t]
        x = signal[t_next] * x0 + sigma[t_next] * noise
    return x


@functools.lru_cache(maxsize=4)
def _published_tables(schedule: Schedule, dtype: torch.dtype) -> tuple[list[float], ...]:
    """√ᾱ, √(1−ᾱ), √(1/ᾱ) and √(1/ᾱ−1) by level, rounded as a table of this dtype is; plain numbers wait for no device."""
    exact = schedule.alphas_cumprod
    rounded = exact.to(dtype)
    tables = rounded.sqrt(), (1 - rounded).sqrt(), (1 / exact).sqrt().to(dtype), (1 / exact - 1).sqrt().to(dtype)
    return tuple(table.tolist() for table in tables)


def samplers() -> Registry[Sampler]:
    """A fresh registry of the samplers that ship."""
    return Registry("sampler", {"ddim": ddim, "published": published})

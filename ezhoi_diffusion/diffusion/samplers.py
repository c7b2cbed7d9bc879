"""Samplers: functions from a centred feature to its bridged version."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ezhoi_diffusion.diffusion.normalization import rescale
from ezhoi_diffusion.diffusion.schedule import Schedule

PredictX0 = Callable[[Tensor, int], Tensor]
"""(x [N, D] of norm `scale_factor`, timestep) -> estimate of x0 [N, D]."""


class Sampler(Protocol):
    """A sampler, as `register_samplers` takes it."""

    def __call__(
        self, predict: PredictX0, z: Tensor, *, schedule: Schedule, timesteps: Sequence[int], scale_factor: float
    ) -> Tensor:
        """Bridge centred features.

        Args:
            predict: The denoiser; call it with features of norm `scale_factor`.
            z: Centred features [N, D]. They enter at the first timestep, and no noise is added.
            schedule: The noise schedule.
            timesteps: Where to call `predict`, descending; the last one, −1, is the end and is not evaluated.
            scale_factor: The norm of every input of `predict`.

        Returns:
            Bridged features [N, D] of any norm.
        """


def ddim(predict: PredictX0, z: Tensor, *, schedule: Schedule, timesteps: Sequence[int], scale_factor: float) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, η = 0) that renormalises its input before every evaluation.

    It collects the published step ε = (x/√ᾱ_t − x̂)/√(1/ᾱ_t − 1), x ← √ᾱ_t'·x̂ + √(1−ᾱ_t')·ε by x and x̂.
    """
    alpha_bar = schedule.alphas_cumprod.tolist()
    x = z
    for t, t_next in pairwise(timesteps):
        x = rescale(x, scale_factor)
        x0 = predict(x, t)
        if t_next < 0:
            x = x0
            break
        ratio = math.sqrt((1 - alpha_bar[t_next]) / (1 - alpha_bar[t]))
        x = ratio * x + (math.sqrt(alpha_bar[t_next]) - ratio * math.sqrt(alpha_bar[t])) * x0
    return x


def published(
    predict: PredictX0, z: Tensor, *, schedule: Schedule, timesteps: Sequence[int], scale_factor: float
) -> Tensor:
    """`ddim` to the last digits of the published code: explicit ε, tables in float32. Use it with spacing "published".

    Float32 tables lose three digits of 1 − ᾱ at low timesteps. With an untrained network, unit vectors differed by 2e-5.
    """
    signal, sigma, recip, recipm1 = _published_tables(schedule, z.dtype)
    x = z
    for t, t_next in pairwise(timesteps):
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
    """√ᾱ, √(1−ᾱ), √(1/ᾱ) and √(1/ᾱ−1) by timestep, rounded to `dtype`. Plain numbers wait for no device."""
    exact = schedule.alphas_cumprod
    rounded = exact.to(dtype)
    tables = rounded.sqrt(), (1 - rounded).sqrt(), (1 / exact).sqrt().to(dtype), (1 / exact - 1).sqrt().to(dtype)
    return tuple(table.tolist() for table in tables)

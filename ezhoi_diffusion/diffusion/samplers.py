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
        x = _ddim_step(x, x0, alpha_bar[t], alpha_bar[t_next])
    return x


def cold(predict: PredictX0, z: Tensor, *, schedule: Schedule, timesteps: Sequence[int], scale_factor: float) -> Tensor:
    """The sampler of cold diffusion (Bansal et al. 2022, algorithm 2), for a denoiser that learned from mixtures.

    As in `ddim` only the direction of x reaches the denoiser. But x keeps its own norm between evaluations: a mixture of two
    vectors of norm `scale_factor` has another one, and with a right estimate x stays the mixture that training has at t.
    """
    alpha_bar = schedule.alphas_cumprod.tolist()
    x = z
    for t, t_next in pairwise(timesteps):
        x0 = predict(rescale(x, scale_factor), t)
        if t_next < 0:
            x = x0
            break
        x = _ddim_step(x, x0, alpha_bar[t], alpha_bar[t_next])
    return x


def _ddim_step(x: Tensor, x0: Tensor, alpha_bar: float, alpha_bar_next: float) -> Tensor:
    """x at the next timestep, from x and the estimate x0."""
    ratio = math.sqrt((1 - alpha_bar_next) / (1 - alpha_bar))
    return torch.add(ratio * x, x0, alpha=math.sqrt(alpha_bar_next) - ratio * math.sqrt(alpha_bar))


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

"""How much signal and how much noise each level holds, and what follows from that alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args, overload

import torch
from torch import Tensor

Objective = Literal["pred_x0", "pred_noise", "pred_v"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True, eq=False)
class Schedule:
    """x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε at levels t = 0 … T−1.

    The table is float64 and stays on the CPU: at low levels 1 − ᾱ would lose three digits in float32. Levels
    are an int or an int64 CPU tensor [N]; results have the dtype and the device of the embeddings [N, D].
    """

    alphas_cumprod: Tensor

    @classmethod
    def cosine(cls, timesteps: int = 1000, offset: float = 0.008) -> Schedule:
        """Cosine schedule of Nichol & Dhariwal (2021), with β clipped at 0.999: ᾱ_599 = 0.3408."""
        if timesteps < 1:
            raise ValueError(f"a schedule needs at least one level, not {timesteps}")
        time = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        curve = torch.cos((time + offset) / (1 + offset) * math.pi / 2).square()
        betas = (1 - curve[1:] / curve[:-1]).clamp_max(0.999)
        return cls((1 - betas).cumprod(0))

    @property
    def timesteps(self) -> int:
        """T, the number of levels."""
        return len(self.alphas_cumprod)

    def q_sample(self, x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """x_t [N, D] (Ho et al. 2020, eq. 4)."""
        signal, sigma = self._weights(t, x0)
        return signal * x0 + sigma * noise

    def target(self, objective: Objective, x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """What a network of this objective is to return: x0, ε, or v = √ᾱ·ε − √(1−ᾱ)·x0."""
        if objective == "pred_x0":
            return x0
        if objective == "pred_noise":
            return noise
        signal, sigma = self._weights(t, x0)
        return signal * noise - sigma * x0

    def to_x0(self, objective: Objective, output: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """x0 [N, D] from a network's output (Ho et al. 2020, eq. 15; Salimans & Ho 2022, appendix D)."""
        if objective == "pred_x0":
            return output
        signal, sigma = self._weights(t, x_t)
        if objective == "pred_noise":
            return (x_t - sigma * output) / signal
        return signal * x_t - sigma * output

    def loss_weight(self, objective: Objective, t: Tensor) -> Tensor:
        """Weight of the squared error [N], float32: snr for x0, 1 for ε, snr/(snr+1) for v."""
        alpha_bar = self.alphas_cumprod[t]
        if objective == "pred_noise":
            return torch.ones_like(alpha_bar).float()
        return (alpha_bar / (1 - alpha_bar) if objective == "pred_x0" else alpha_bar).float()

    @overload
    def expected_norm(self, t: int, dim: int, scale_factor: float) -> float: ...
    @overload
    def expected_norm(self, t: Tensor, dim: int, scale_factor: float) -> Tensor: ...
    def expected_norm(self, t: Tensor | int, dim: int, scale_factor: float) -> Tensor | float:
        """√(s²ᾱ + D(1−ᾱ)), float64: the norm of x_t for |x0| = s. Hardly varies for large D."""
        alpha_bar = self._numbers[t] if isinstance(t, int) else self.alphas_cumprod[t]
        return (scale_factor**2 * alpha_bar + dim * (1 - alpha_bar)) ** 0.5

    def _weights(self, t: Tensor | int, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        if isinstance(t, int):  # plain numbers, because a tensor would have to be copied to the device of the rows
            alpha_bar = self._numbers[t]
            return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        table = self.alphas_cumprod[t].unsqueeze(-1)
        return table.sqrt().to(like), (1 - table).sqrt().to(like)

    @cached_property
    def _numbers(self) -> list[float]:
        found: list[float] = self.alphas_cumprod.tolist()
        return found


def isotropic_estimate(
    schedule: Schedule, objective: Objective, dim: int, scale_factor: float
) -> tuple[Tensor, Tensor]:
    """What a row's direction alone says of the target, when nothing is known of the data.

    Returns (skip [T], residual [T]), float64. For x = scale·unit(x_t) the estimate of the target is skip_t·x,
    and residual_t is the root mean square, per dimension, of what it misses. This is the Wiener estimate for
    data without a preferred direction: z and ε are then orthogonal, of norms s and √D, and x_t lies at cosine
    c = s√ᾱ/√(s²ᾱ + D(1−ᾱ)) to z. For pred_x0: skip = c, residual = s·√((1−c²)/D).
    """
    levels = torch.arange(schedule.timesteps)
    alpha_bar = schedule.alphas_cumprod
    signal, sigma, root = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), math.sqrt(dim)
    norm = schedule.expected_norm(levels, dim, scale_factor)
    c, c_noise = scale_factor * signal / norm, root * sigma / norm
    none, one = torch.zeros_like(signal), torch.ones_like(signal)
    on_z, on_noise = {"pred_x0": (one, none), "pred_noise": (none, one), "pred_v": (-sigma, signal)}[objective]
    along = scale_factor * on_z * c + root * on_noise * c_noise
    across = scale_factor * on_z * c_noise - root * on_noise * c
    return along / scale_factor, across / root

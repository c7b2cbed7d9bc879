"""Signal and noise of each timestep, and the estimate that follows from them alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from ezhoi_diffusion.diffusion.recipes import Objective


@dataclass(frozen=True, eq=False)
class Schedule:
    """x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε at timesteps t = 0 … T−1.

    The table is float64 and stays on the CPU: in float32, 1 − ᾱ would lose three digits at low timesteps. Timesteps are an
    int or an int64 CPU tensor [N]. Results have dtype and device of the embeddings [N, D].
    """

    alphas_cumprod: Tensor

    @classmethod
    def cosine(cls, num_timesteps: int = 1000, offset: float = 0.008) -> Schedule:
        """Cosine schedule of Nichol & Dhariwal (2021), with β clipped at 0.999; ᾱ_599 = 0.3408.

        Raises:
            ValueError: num_timesteps is below 1.
        """
        if num_timesteps < 1:
            raise ValueError(f"a schedule needs at least one timestep, not {num_timesteps}")
        time = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
        curve = torch.cos((time + offset) / (1 + offset) * math.pi / 2).square()
        betas = (1 - curve[1:] / curve[:-1]).clamp_max(0.999)
        return cls((1 - betas).cumprod(0))

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def q_sample(self, x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """Return x_t [N, D] (Ho et al. 2020, eq. 4)."""
        signal, sigma = self._weights(t, x0)
        return signal * x0 + sigma * noise

    def target(self, objective: Objective, x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """Return what a network of this objective learns to return: x0, ε, or v = √ᾱ·ε − √(1−ᾱ)·x0."""
        if objective == "pred_x0":
            return x0
        if objective == "pred_noise":
            return noise
        signal, sigma = self._weights(t, x0)
        return signal * noise - sigma * x0

    def to_x0(self, objective: Objective, output: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """Return x0 [N, D] from a network's output (Ho et al. 2020, eq. 15; Salimans & Ho 2022, appendix D)."""
        if objective == "pred_x0":
            return output
        signal, sigma = self._weights(t, x_t)
        if objective == "pred_noise":
            return (x_t - sigma * output) / signal
        return signal * x_t - sigma * output

    def loss_weight(self, objective: Objective, t: Tensor) -> Tensor:
        """Return the weight of the squared error [N], float32: snr for x0, 1 for ε, snr/(snr+1) for v."""
        alpha_bar = self.alphas_cumprod[t]
        if objective == "pred_noise":
            return torch.ones_like(alpha_bar).float()
        return (alpha_bar / (1 - alpha_bar) if objective == "pred_x0" else alpha_bar).float()

    @overload
    def expected_norm(self, t: int, dim: int, scale_factor: float) -> float: ...
    @overload
    def expected_norm(self, t: Tensor, dim: int, scale_factor: float) -> Tensor: ...
    def expected_norm(self, t: Tensor | int, dim: int, scale_factor: float) -> Tensor | float:
        """Return √(s²ᾱ + D(1−ᾱ)), float64: the norm of x_t for |x0| = s. For large D it hardly varies."""
        alpha_bar = self._numbers[t] if isinstance(t, int) else self.alphas_cumprod[t]
        return (scale_factor**2 * alpha_bar + dim * (1 - alpha_bar)) ** 0.5

    def _weights(self, t: Tensor | int, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        if isinstance(t, int):  # plain numbers: a tensor would be copied to the device of the features
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
    """Estimate the target from a direction alone, for data without a preferred direction.

    For x = s·unit(x_t) the estimate is skip_t·x. It is the Wiener estimate for z and ε that are orthogonal, of norms s and √D:
    then x_t lies at cosine c = s√ᾱ/√(s²ᾱ + D(1−ᾱ)) to z. For pred_x0, skip = c and residual = s·√((1−c²)/D).

    Returns:
        skip [T] and residual [T], float64. residual_t is the root mean square error of the estimate, per dimension.
    """
    alpha_bar = schedule.alphas_cumprod
    signal, sigma, root = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), math.sqrt(dim)
    norm = schedule.expected_norm(torch.arange(schedule.num_timesteps), dim, scale_factor)
    c, c_noise = scale_factor * signal / norm, root * sigma / norm
    zero, one = torch.zeros_like(signal), torch.ones_like(signal)
    on_z, on_noise = {"pred_x0": (one, zero), "pred_noise": (zero, one), "pred_v": (-sigma, signal)}[objective]
    along = scale_factor * on_z * c + root * on_noise * c_noise
    across = scale_factor * on_z * c_noise - root * on_noise * c
    return along / scale_factor, across / root

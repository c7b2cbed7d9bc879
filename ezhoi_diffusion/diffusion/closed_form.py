"""Denoisers in closed form: the posterior mean of x0 under two models of the data.

They take the norm of x_t to be the one expected at its timestep. For large D it hardly differs from that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ezhoi_diffusion.diffusion.denoiser import DenoiserError, FittedDenoiser
from ezhoi_diffusion.diffusion.recipes import Objective
from ezhoi_diffusion.diffusion.schedule import Schedule

MAX_DIM, MAX_STORED = 4096, 65_536


class _ScheduleTables(nn.Module):
    """Signal, noise variance and expected norm over `scale_factor`, by timestep [T, 1]. Not part of the weights."""

    signal: Tensor
    variance: Tensor
    norm: Tensor

    def __init__(self, dim: int, schedule: Schedule, scale_factor: float) -> None:
        super().__init__()
        alpha_bar = schedule.alphas_cumprod
        norm = schedule.expected_norm(torch.arange(schedule.num_timesteps), dim, scale_factor) / scale_factor
        for name, table in (("signal", alpha_bar.sqrt()), ("variance", 1 - alpha_bar), ("norm", norm)):
            self.register_buffer(name, table.float().unsqueeze(1), persistent=False)


class Gaussian(FittedDenoiser):
    """The ideal denoiser of a normal distribution N(m, Σ): x̂0 = m + √ᾱ·Σ(ᾱΣ + (1−ᾱ)I)⁻¹(x_t − √ᾱ·m).

    This is the Wiener filter (Bishop 2006, eq. 2.116). Σ is the shrunk estimate of Ledoit & Wolf (2004), because there are
    fewer features than dimensions. It is stored as orthonormal axes [D, D] and the variances along them [D].
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor

    def __init__(self, dim: int, schedule: Schedule, scale_factor: float) -> None:
        super().__init__()
        self.tables = _ScheduleTables(dim, schedule, scale_factor)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("axes", torch.eye(dim))
        self.register_buffer("variances", torch.full((dim,), scale_factor**2 / dim))

    def fit(self, z: Tensor) -> None:
        """Estimate mean and covariance of z [N, D]. Raises DenoiserError for N < 2."""
        from sklearn.covariance import LedoitWolf

        if len(z) < 2:
            raise DenoiserError(f"gaussian needs at least two features to estimate a covariance, not {len(z)}")
        estimate = LedoitWolf(store_precision=False).fit(z.double().numpy())
        variances, axes = torch.linalg.eigh(torch.from_numpy(estimate.covariance_))
        self.mean.copy_(torch.from_numpy(estimate.location_))
        self.axes.copy_(axes)
        self.variances.copy_(variances.clamp_min(0))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the posterior mean [N, D] for x [N, D] of norm `scale_factor` at timesteps t [N] or [1]."""
        signal, variance = self.tables.signal[t], self.tables.variance[t]
        gain = signal * self.variances / (signal.square() * self.variances + variance)
        off = self.tables.norm[t] * x - signal * self.mean
        return self.mean + (gain * (off @ self.axes)) @ self.axes.T


class Empirical(FittedDenoiser):
    """The ideal denoiser of stored features, each as likely as the others: x̂0 = Σ wᵢzᵢ, w = softmax(√ᾱ·x_t·zᵢ/(1−ᾱ)).

    It is attention over the stored features. All have the same norm, so |zᵢ|² cancels.
    """

    memorizes = True
    stored: Tensor

    def __init__(self, dim: int, schedule: Schedule, scale_factor: float, count: int) -> None:
        super().__init__()
        self.tables = _ScheduleTables(dim, schedule, scale_factor)
        self.register_buffer("stored", torch.zeros(count, dim))

    def fit(self, z: Tensor) -> None:
        """Store z [N, D]. Raises DenoiserError for no feature and for more than 65536."""
        _require_count(len(z))
        self.stored = z.to(self.stored, copy=True)

    def fitted_options(self) -> dict[str, Any]:
        """Return how many features are stored."""
        return {"count": len(self.stored)}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the posterior mean [N, D] for x [N, D] of norm `scale_factor` at timesteps t [N] or [1]."""
        precision = self.tables.signal[t] * self.tables.norm[t] / self.tables.variance[t]
        return torch.softmax(precision * (x @ self.stored.T), dim=1) @ self.stored


def build_gaussian(dim: int, schedule: Schedule, objective: Objective, scale_factor: float) -> nn.Module:
    """Build a Gaussian that is isotropic until fitted. Raises DenoiserError unless pred_x0 and D <= 4096."""
    _require("gaussian", dim, objective)
    return Gaussian(dim, schedule, scale_factor)


def build_empirical(
    dim: int, schedule: Schedule, objective: Objective, scale_factor: float, *, count: int = 1
) -> nn.Module:
    """Build an Empirical with `count` stored zeros. Raises DenoiserError unless pred_x0, D <= 4096, count <= 65536."""
    _require("empirical", dim, objective)
    _require_count(count)
    return Empirical(dim, schedule, scale_factor, count)


def _require(name: str, dim: int, objective: Objective) -> None:
    if objective != "pred_x0":
        raise DenoiserError(f"{name} is the posterior mean of x0: its objective is pred_x0, not {objective}")
    if dim > MAX_DIM:
        raise DenoiserError(f"{name} takes features of width up to {MAX_DIM}, not {dim}")


def _require_count(count: int) -> None:
    if type(count) is not int or not 1 <= count <= MAX_STORED:
        raise DenoiserError(f"empirical stores 1 to {MAX_STORED} features, not {count!r}")

"""Denoisers that need no training: the posterior mean of x0 under two models of the rows.

Both are functions of the direction and the level of x_t, as every denoiser here is; its norm is taken to be that which x_t has
at its level, from which it hardly differs for large D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ezhoi_diffusion.diffusion.schedule import Objective, Schedule
from ezhoi_diffusion.diffusion.unet1d import DenoiserError

MAX_DIM, MAX_ROWS = 4096, 65_536


class _Levels(nn.Module):
    """Signal, noise variance and expected norm over `scale`, by level [T, 1]; no part of the weights."""

    signal: Tensor
    variance: Tensor
    norm: Tensor

    def __init__(self, dim: int, schedule: Schedule, scale_factor: float) -> None:
        super().__init__()
        alpha_bar = schedule.alphas_cumprod
        norm = schedule.expected_norm(torch.arange(schedule.timesteps), dim, scale_factor) / scale_factor
        for name, table in (("signal", alpha_bar.sqrt()), ("variance", 1 - alpha_bar), ("norm", norm)):
            self.register_buffer(name, table.float().unsqueeze(1), persistent=False)


class Gaussian(nn.Module):
    """x̂0 = m + √ᾱ·Σ(ᾱΣ + (1−ᾱ)I)⁻¹(x_t − √ᾱ·m): the posterior mean for rows from a normal distribution N(m, Σ).

    Wiener's filter (Bishop 2006, eq. 2.116). Σ is Ledoit & Wolf's (2004) shrunk estimate, because there are fewer rows than
    dimensions; it is kept as orthonormal axes [D, D] and the variances along them [D].
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor

    def __init__(self, dim: int, schedule: Schedule, scale_factor: float) -> None:
        super().__init__()
        self.levels = _Levels(dim, schedule, scale_factor)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("axes", torch.eye(dim))
        self.register_buffer("variances", torch.full((dim,), scale_factor**2 / dim))

    def fit(self, z: Tensor) -> None:
        """Take mean and covariance of rows z [N, D]. Raises DenoiserError for fewer than two."""
        from sklearn.covariance import LedoitWolf

        if len(z) < 2:
            raise DenoiserError(f"wiener needs at least two rows to know how they vary, not {len(z)}")
        estimate = LedoitWolf().fit(z.double().numpy())
        variances, axes = torch.linalg.eigh(torch.from_numpy(estimate.covariance_))
        self.mean.copy_(torch.from_numpy(estimate.location_))
        self.axes.copy_(axes)
        self.variances.copy_(variances.clamp_min(0))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The posterior mean [N, D] for x [N, D] of norm `scale` at levels t [N] or [1]."""
        signal, variance = self.levels.signal[t], self.levels.variance[t]
        gain = signal * self.variances / (signal.square() * self.variances + variance)
        off = self.levels.norm[t] * x - signal * self.mean
        return self.mean + (gain * (off @ self.axes)) @ self.axes.T


class Empirical(nn.Module):
    """x̂0 = Σ wᵢzᵢ, w = softmax(√ᾱ·x_t·zᵢ/(1−ᾱ)): the posterior mean where x0 is one of the stored rows, each as likely.

    An attention over them. All of them have the norm `scale`, so |zᵢ|² is the same for all and falls out.
    """

    rows: Tensor

    def __init__(self, dim: int, schedule: Schedule, scale_factor: float, rows: int) -> None:
        super().__init__()
        self.levels = _Levels(dim, schedule, scale_factor)
        self.register_buffer("rows", torch.zeros(rows, dim))

    def fit(self, z: Tensor) -> None:
        """Store rows z [N, D], as many as there is room for. Raises DenoiserError for another number."""
        if len(z) != len(self.rows):
            raise DenoiserError(f"texts has room for {len(self.rows)} rows, and there are {len(z)}")
        self.rows.copy_(z)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The posterior mean [N, D] for x [N, D] of norm `scale` at levels t [N] or [1]."""
        precision = self.levels.signal[t] * self.levels.norm[t] / self.levels.variance[t]
        return torch.softmax(precision * (x @ self.rows.T), dim=1) @ self.rows


def build_gaussian(dim: int, schedule: Schedule, objective: Objective, scale_factor: float) -> nn.Module:
    """Until it is fitted, isotropic. Raises DenoiserError for another objective than pred_x0, and for D above 4096."""
    _require("gaussian", dim, objective)
    return Gaussian(dim, schedule, scale_factor)


def build_empirical(dim: int, schedule: Schedule, objective: Objective, scale_factor: float, *, rows: int) -> nn.Module:
    """Room for `rows` rows. Raises DenoiserError for another objective than pred_x0, for D above 4096, for too many rows."""
    _require("empirical", dim, objective)
    if type(rows) is not int or not 1 <= rows <= MAX_ROWS:
        raise DenoiserError(f"texts: rows must be a whole number from 1 to {MAX_ROWS}, not {rows!r}")
    return Empirical(dim, schedule, scale_factor, rows)


def _require(name: str, dim: int, objective: Objective) -> None:
    if objective != "pred_x0":
        raise DenoiserError(f"{name} is the posterior mean of x0: its objective is pred_x0, not {objective}")
    if dim > MAX_DIM:
        raise DenoiserError(f"{name} takes rows of width up to {MAX_DIM}, not {dim}")

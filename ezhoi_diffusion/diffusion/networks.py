"""Denoisers: networks `forward(x [N, D], t [N] or [1] int64) -> [N, D]`, the raw prediction of their objective.

x has norm `scale` in every row: a denoiser sees a direction and a level, and nothing else. In training each row has a level of
its own; a sampler has one for all rows, t [1], so what depends on it alone is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ezhoi_diffusion.diffusion.closed_form import build_empirical, build_gaussian
from ezhoi_diffusion.diffusion.schedule import Objective, Schedule, isotropic_estimate
from ezhoi_diffusion.diffusion.unet1d import DenoiserError, build_unet1d
from ezhoi_diffusion.registry import Registry

TIME_FEATURES = 128
CLOSED_FORMS = ("gaussian", "empirical")  # they are fitted, not trained


DenoiserBuilder = Callable[..., nn.Module]
"""(dim, schedule, objective, scale, **denoiser_options) → a freshly initialised network, on the CPU."""


class ResidualMlp(nn.Module):
    """Residual MLP with adaptive LayerNorm, after RCG (Li et al. 2024) and the diffusion head of MAR.

    An embedding's coordinates have no order, so nothing is gained by convolving over them. The output is the
    isotropic estimate plus a correction of unit scale, in the manner of EDM (Karras et al. 2022):
    skip_t·x + residual_t·F(x·√D/s, t). F starts at zero, so training starts at that estimate, not at noise.
    """

    skip: Tensor
    residual: Tensor
    time_table: Tensor

    def __init__(
        self, dim: int, schedule: Schedule, objective: Objective, scale: float, width: int, depth: int
    ) -> None:
        super().__init__()
        self.input_gain = math.sqrt(dim) / scale
        # Derived from the configuration, hence no part of the weights.
        skip, residual = isotropic_estimate(schedule, objective, dim, scale)
        self.register_buffer("skip", skip.float().unsqueeze(1), persistent=False)
        self.register_buffer("residual", residual.float().unsqueeze(1), persistent=False)
        self.register_buffer("time_table", _sinusoids(schedule.timesteps), persistent=False)
        self.time = nn.Sequential(
            nn.Linear(TIME_FEATURES, TIME_FEATURES),
            nn.SiLU(),
            nn.Linear(TIME_FEATURES, TIME_FEATURES),
            nn.SiLU(),
        )
        self.enter = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = _AdaptiveNorm(width)
        self.leave = nn.Linear(width, dim)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The raw prediction [N, D] for x [N, D] at levels t [N] or [1]."""
        condition = self.time(self.time_table[t])
        h = self.enter(self.input_gain * x)
        for block in self.blocks:
            h = block(h, condition)
        correction: Tensor = self.leave(self.norm(h, condition))
        return self.skip[t] * x + self.residual[t] * correction


class _AdaptiveNorm(nn.Module):
    """LayerNorm whose shift and scale come from the condition; starts as a plain one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(TIME_FEATURES, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        normed: Tensor = self.norm(h)
        return torch.addcmul(shift, normed, 1 + scale)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _AdaptiveNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        change: Tensor = self.mlp(self.norm(h, condition))
        return h + change


def _sinusoids(timesteps: int) -> Tensor:
    """Position features [T, 128] of Vaswani et al. (2017)."""
    half = TIME_FEATURES // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / (half - 1))
    angle = torch.arange(timesteps, dtype=torch.float64).unsqueeze(1) * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=1).float()


def build_mlp(
    dim: int, schedule: Schedule, objective: Objective, scale: float, *, width: int = 512, depth: int = 3
) -> nn.Module:
    """The default denoiser. Raises DenoiserError for a width outside 8…4096 or a depth outside 1…12.

    width 512 is CLIP ViT-B's own width.
    """
    # The bounds keep a hostile or mistyped artefact from claiming all memory before its weights are looked at: the
    # largest network they admit takes about 2 GB.
    for name, value, low, high in (("width", width, 8, 4096), ("depth", depth, 1, 12)):
        if type(value) is not int or not low <= value <= high:
            raise DenoiserError(f"mlp: {name} must be a whole number from {low} to {high}, not {value!r}")
    return ResidualMlp(dim, schedule, objective, scale, width, depth)


def denoisers() -> Registry[DenoiserBuilder]:
    """A fresh registry of the denoisers that ship."""
    return Registry(
        "denoiser", {"mlp": build_mlp, "unet1d": build_unet1d, "gaussian": build_gaussian, "empirical": build_empirical}
    )

"""The default denoiser: a residual MLP."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ezhoi_diffusion.diffusion.denoiser import DenoiserError
from ezhoi_diffusion.diffusion.recipes import Objective
from ezhoi_diffusion.diffusion.schedule import Schedule, isotropic_estimate

TIME_FEATURES = 128
MAX_DEFAULT_WIDTH = 512  # the width of CLIP ViT-B


class ResidualMlp(nn.Module):
    """Residual MLP with adaptive LayerNorm, after RCG (Li et al. 2024) and the diffusion head of MAR.

    The coordinates of an embedding have no order, so a convolution over them gains nothing. As in EDM (Karras et al. 2022), the
    output is the isotropic estimate plus a correction of unit scale: skip_t·x + residual_t·F(x·√D/s, t). F starts at zero, so
    training starts at that estimate.
    """

    skip: Tensor
    residual: Tensor
    time_table: Tensor

    def __init__(
        self, dim: int, schedule: Schedule, objective: Objective, scale_factor: float, width: int, depth: int
    ) -> None:
        super().__init__()
        self.input_gain = math.sqrt(dim) / scale_factor
        # The configuration determines these tables, so they are not part of the weights.
        skip, residual = isotropic_estimate(schedule, objective, dim, scale_factor)
        self.register_buffer("skip", skip.float().unsqueeze(1), persistent=False)
        self.register_buffer("residual", residual.float().unsqueeze(1), persistent=False)
        self.register_buffer("time_table", _sinusoids(schedule.num_timesteps), persistent=False)
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
        """Return the raw prediction [N, D] for x [N, D] at timesteps t [N] or [1]."""
        condition = self.time(self.time_table[t])
        h = self.enter(self.input_gain * x)
        for block in self.blocks:
            h = block(h, condition)
        correction: Tensor = self.leave(self.norm(h, condition))
        return torch.addcmul(self.skip[t] * x, self.residual[t], correction)


class _AdaptiveNorm(nn.Module):
    """LayerNorm with shift and scale from the condition. It starts as a plain LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(TIME_FEATURES, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        if len(condition) == 1:  # one timestep for all
            return F.layer_norm(h, h.shape[1:], 1 + scale[0], shift[0])
        return torch.addcmul(shift, F.layer_norm(h, h.shape[1:]), 1 + scale)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _AdaptiveNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        change: Tensor = self.mlp(self.norm(h, condition))
        return h + change


def _sinusoids(num_timesteps: int) -> Tensor:
    """Position features [T, 128] of Vaswani et al. (2017)."""
    half = TIME_FEATURES // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / (half - 1))
    angle = torch.arange(num_timesteps, dtype=torch.float64).unsqueeze(1) * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=1).float()


def build_mlp(
    dim: int, schedule: Schedule, objective: Objective, scale_factor: float, *, width: int | None = None, depth: int = 3
) -> nn.Module:
    """Build the default denoiser. Its width is 4·D by default, as in the MLP of a Transformer (Vaswani et al. 2017), at most 512.

    Raises:
        DenoiserError: The width is outside 8…4096, or the depth outside 1…12. An untrusted artefact could otherwise
            claim all memory before its weights are read; the largest network allowed takes about 2 GB.
    """
    width = min(4 * dim, MAX_DEFAULT_WIDTH) if width is None else width
    for name, value, low, high in (("width", width, 8, 4096), ("depth", depth, 1, 12)):
        if type(value) is not int or not low <= value <= high:
            raise DenoiserError(f"mlp: {name} must be a whole number from {low} to {high}, not {value!r}")
    return ResidualMlp(dim, schedule, objective, scale_factor, width, depth)

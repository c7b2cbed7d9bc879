"""At which timesteps a sampler evaluates its denoiser."""

from __future__ import annotations

import functools

import torch

from ezhoi_diffusion.diffusion.recipes import Spacing

POWERS = {"linear": 1, "quadratic": 2, "cubic": 3}


@functools.lru_cache(maxsize=1024)
def make_timesteps(spacing: Spacing, num_steps: int, start_timestep: int) -> tuple[int, ...]:
    """List the timesteps of `num_steps` evaluations, highest first, and −1 for the end.

    Args:
        spacing: linear spaces them evenly: 599 479 359 239 119 −1 for (5, 600). quadratic and cubic use
            start_timestep·(i/num_steps)^p − 1, denser near the end, where the direction is decided. published truncates
            linspace(−1, start_timestep − 1) in float32, as the published code does.
        num_steps: Number of evaluations, S.
        start_timestep: t0; the first evaluation is at t0 − 1.

    Returns:
        num_steps + 1 timesteps from start_timestep − 1 down to −1, all different.

    Raises:
        ValueError: num_steps is below 1 or above start_timestep.
    """
    if not 1 <= num_steps <= start_timestep:
        raise ValueError(
            f"need 1 <= num_steps <= start_timestep, not num_steps={num_steps}, start_timestep={start_timestep}"
        )
    if spacing == "published":
        return tuple(torch.linspace(-1, start_timestep - 1, num_steps + 1).int().flip(0).tolist())
    power = POWERS[spacing]
    timesteps = [-1]
    for i in range(1, num_steps + 1):  # whole numbers: rounding would depend on the machine
        timesteps.append(max(start_timestep * i**power // num_steps**power - 1, timesteps[-1] + 1))
    return tuple(timesteps[::-1])

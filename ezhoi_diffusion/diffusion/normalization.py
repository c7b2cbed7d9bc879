"""Maps embeddings into the space of the diffusion, and back.

Source: Diffusion Bridge (CVPR 2025). Each modality loses its own mean, and the network sees vectors of one norm only.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ezhoi_diffusion.features.statistics import EPS


def rescale(x: Tensor, scale_factor: float) -> Tensor:
    """Set the norm of every feature of x [N, D] to `scale_factor`."""
    scaled: Tensor = x * (scale_factor / x.norm(dim=-1, keepdim=True).clamp_min(EPS))
    return scaled


def normalize(x: Tensor, mean: Tensor, scale_factor: float) -> tuple[Tensor, Tensor]:
    """Center features and set their norm.

    Args:
        x: Features [N, D].
        mean: Mean [D] of the unit features.
        scale_factor: The norm s of every result.

    Returns:
        z = s · unit(unit(x) − mean) [N, D], and the norms |x| [N, 1].
    """
    norm = x.norm(dim=-1, keepdim=True)
    return rescale(x / norm.clamp_min(EPS) - mean, scale_factor), norm


def shift(x: Tensor, mean: Tensor, z: Tensor, sampled: Tensor) -> Tensor:
    """Move features as far as `sampled` is from z, in their own units: the result has its own norm.

    Args:
        x: Features [N, D].
        mean: Mean [D] of the unit features.
        z: Their normalised form [N, D], which stands for x itself.
        sampled: Where z was moved to [N, D].

    Returns:
        x + |x|·|unit(x) − mean|/|z|·(sampled − z) [N, D].
    """
    length = (F.normalize(x, dim=-1) - mean).norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)
    moved: Tensor = x + length / z.norm(dim=-1, keepdim=True).clamp_min(EPS) * (sampled - z)
    return moved


def uncenter(z: Tensor, mean: Tensor) -> Tensor:
    """Return the unit vectors u [N, D] for which u − mean points along z [N, D], whatever the norm of z.

    u = μ + kĉ with k = −b + √(b² + 1 − |μ|²) and b = μ·ĉ, the positive root of |μ + kĉ| = 1. There is exactly one where
    |μ| < 1.

    Raises:
        ValueError: The mean [D] has a norm of 1 or more. It is checked on the CPU only: on a GPU the check would wait
            for the device.
    """
    squared = mean.square().sum()
    if mean.device.type == "cpu" and not squared < 1:
        raise ValueError(
            f"the mean's norm is {squared.sqrt():.6f}: a direction has no unique inverse unless it is below 1"
        )
    direction = F.normalize(z, dim=-1)
    b = (direction * mean).sum(-1, keepdim=True)
    k = (b.square() + 1 - squared).sqrt() - b
    return mean + k * direction

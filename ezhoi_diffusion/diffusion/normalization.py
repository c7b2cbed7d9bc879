"""The chain that takes embeddings into the diffusion's space, and its exact inverse.

Source: Diffusion Bridge (CVPR 2025). There every modality loses its own mean, and the network only ever sees
rows of one norm.
"""

from __future__ import annotations

from torch import Tensor

from ezhoi_diffusion.features.statistics import unit


def rescale(x: Tensor, scale_factor: float) -> Tensor:
    """Rows of x [N, D] at norm `scale`."""
    return scale_factor * unit(x)


def normalize(x: Tensor, mean: Tensor, scale_factor: float) -> tuple[Tensor, Tensor]:
    """z = scale · unit(unit(x) − mean) [N, D] for x [N, D] and mean [D], and the norms |x| [N, 1]."""
    return rescale(unit(x) - mean, scale_factor), x.norm(dim=-1, keepdim=True)


def uncenter(z: Tensor, mean: Tensor) -> Tensor:
    """The unit rows u [N, D] for which u − mean points along z [N, D], whatever the norm of z.

    u = μ + kĉ with k = −b + √(b² + 1 − |μ|²), b = μ·ĉ: the positive root of |μ + kĉ| = 1. It exists, and is
    the only one, where |μ| < 1; raises ValueError otherwise, if μ is on a CPU: to look elsewhere would make the device wait.
    """
    squared = mean.square().sum()
    if mean.device.type == "cpu" and not squared < 1:
        raise ValueError(f"the mean's norm is {squared.sqrt():.6f}: a direction has no unique inverse unless < 1")
    direction = unit(z)
    b = (direction * mean).sum(-1, keepdim=True)
    k = (b.square() + 1 - squared).sqrt() - b
    return mean + k * direction

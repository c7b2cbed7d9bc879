"""The validation split."""

from __future__ import annotations

import torch
from torch import Tensor

from ezhoi_diffusion.rng import generator

FRACTION = 0.1


def validation_mask(count: int, fraction: float = FRACTION, seed: int = 0) -> Tensor:
    """Choose the items that are held out for validation. A larger fraction contains the smaller one.

    Args:
        count: Number of items, such as images.
        fraction: Share to hold out; at least one item is.
        seed: Leave it at 0 for images. All trainings then hold out the same images, and these may choose between them.

    Returns:
        [count] bool, True for held-out items.

    Raises:
        ValueError: `count` is less than 2.
    """
    if count < 2:
        raise ValueError(f"a validation split needs at least 2, found {count}")
    chosen = torch.zeros(count, dtype=torch.bool)
    number = min(max(1, round(fraction * count)), count - 1)
    chosen[torch.randperm(count, generator=generator(seed, "split"))[:number]] = True
    return chosen

"""What is held out for validation."""

from __future__ import annotations

import torch
from torch import Tensor

from ezhoi_diffusion.rng import generator

FRACTION = 0.1


def validation_mask(count: int, fraction: float = FRACTION, seed: int = 0) -> Tensor:
    """[count] bool, True for about `fraction` of them, and for at least one. A larger fraction contains the smaller one.

    For images leave the seed at 0: what was learned on the others, by whatever means and seed, may then be chosen by these.
    Raises ValueError where there are fewer than two.
    """
    if count < 2:
        raise ValueError(f"a validation split needs at least 2, found {count}")
    chosen = torch.zeros(count, dtype=torch.bool)
    number = min(max(1, round(fraction * count)), count - 1)
    chosen[torch.randperm(count, generator=generator(seed, "split"))[:number]] = True
    return chosen

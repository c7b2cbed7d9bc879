"""Which rows, levels and noise belong to which batch: pure functions of seed and batch number.

Nothing of it is state, so a resumed run and a run on several processes see what an uninterrupted run on one
sees.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ezhoi_diffusion.rng import generator


def batch_indices(rows: int, batch_size: int, seed: int, batch: int) -> Tensor:
    """Rows [batch_size] of one batch: a stretch of all epochs' permutations laid end to end.

    A batch may begin in one epoch and end in the next, or span several where rows < batch_size.
    """
    first, last = batch * batch_size, (batch + 1) * batch_size
    epochs = range(first // rows, (last - 1) // rows + 1)
    return torch.cat([_order(rows, seed, k)[max(0, first - k * rows) : last - k * rows] for k in epochs])


@lru_cache(maxsize=2)  # a batch lies in one epoch or two; of a million rows, a permutation takes longer than a step
def _order(rows: int, seed: int, epoch: int) -> Tensor:
    """All rows [rows] in the order of an epoch. Not to be written into."""
    return torch.randperm(rows, generator=generator(seed, "order", epoch))


def levels_and_noise(shape: tuple[int, int], timesteps: int, seed: int, batch: int) -> tuple[Tensor, Tensor]:
    """Levels [N] int64, uniform, and standard normal noise [N, D] for one batch."""
    source = generator(seed, "noise", batch)
    return torch.randint(timesteps, shape[:1], generator=source), torch.randn(shape, generator=source)

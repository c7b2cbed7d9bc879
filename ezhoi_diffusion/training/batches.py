"""Which features, timesteps and noise belong to which batch.

All are functions of seed and batch number. A resumed run and a run on several processes therefore see the same batches as one
uninterrupted process.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ezhoi_diffusion.rng import generator


def batch_indices(count: int, batch_size: int, seed: int, batch: int) -> Tensor:
    """Return the indices [batch_size] of one batch of `count` features.

    The permutations of all epochs are laid end to end and cut into batches. A batch may span epochs: several where `count` is
    below `batch_size`.
    """
    first, last = batch * batch_size, (batch + 1) * batch_size
    epochs = range(first // count, (last - 1) // count + 1)
    return torch.cat([_permutation(count, seed, k)[max(0, first - k * count) : last - k * count] for k in epochs])


@lru_cache(maxsize=2)  # a batch lies in one epoch or two; permuting a million takes longer than a step
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    """Return all indices [count] in the order of an epoch. Callers must not write into it."""
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def timesteps_and_noise(shape: tuple[int, int], num_timesteps: int, seed: int, batch: int) -> tuple[Tensor, Tensor]:
    """Draw uniform timesteps [N] int64 and standard normal noise [N, D] for one batch."""
    rng = generator(seed, "noise", batch)
    return torch.randint(num_timesteps, shape[:1], generator=rng), torch.randn(shape, generator=rng)

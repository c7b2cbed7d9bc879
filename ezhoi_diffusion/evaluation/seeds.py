"""Training seeds as a source of chance beside images: weights for a bootstrap, and Student's t for few seeds.

Seeds and images are crossed: every seed is scored on every image. Both get random weights of their own, and a result
has the product (Owen & Eckles, Annals of Applied Statistics 2012). Images have the counts of a bootstrap. The n seeds have

    w_i = 1/n + (g_i − mean g) / √(n(n − 1)),   g_i ~ N(0, 1),

so the mean over seeds, Σ w_i·AP_i, has the variance s²/n of a mean, with s² the sample variance (n − 1). Counts of a bootstrap
would have (n − 1)/n of it, far too little for three seeds. What seeds and images do together counts in both sources, which
errs on the wide side (Owen, Annals of Applied Statistics 2007).

s² is known from n − 1 degrees of freedom only. The sum of both variances has those of Satterthwaite (Biometrics Bulletin
1946), where the images' part counts as known.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from ezhoi_diffusion.rng import generator

Array = NDArray[np.float64]


def seed_weights(seeds: int, replicates: int, seed: int) -> Array:
    """Weights of the n seeds of a bridge, [n, 1 + B]: 1/n in the first column, the original sample; then as drawn.

    The same for all bridges with as many seeds, so that points of one sweep keep their seeds together. One seed has 1.
    """
    weights = np.full((seeds, 1 + replicates), 1 / seeds)
    if seeds > 1:
        drawn = torch.randn(seeds, replicates, generator=generator(seed, "seeds", seeds), dtype=torch.float64).numpy()
        weights[:, 1:] += (drawn - drawn.mean(0)) / math.sqrt(seeds * (seeds - 1))
    return weights


def degrees_of_freedom(variance: Array, parts: Array, freedom: Array) -> Array:
    """Satterthwaite's degrees of freedom [N] of variances [N]; infinite where no part is an estimate.

    Args:
        variance: Of N differences.
        parts: Those parts of it that are estimates, [N, M]; zero for none.
        freedom: Their degrees of freedom [N, M].
    """
    doubt = (parts**2 / freedom).sum(1)
    found = np.divide(variance**2, doubt, out=np.full(len(variance), np.inf), where=doubt > 0)
    return np.asarray(np.where(doubt > 0, np.maximum(found, freedom.min(1)), np.inf))


def widened(bounds: Array, found: Array, df: Array, level: float) -> Array:
    """Bounds [N, 2] around values [N, 1] as Student's t has them. Infinite df [N] change nothing."""
    from scipy import stats  # slow to import, and few runs need it

    tail = (1 - level) / 2
    factor = stats.t.isf(tail, df) / stats.norm.isf(tail)
    few = np.isfinite(df)[:, None]
    return np.asarray(np.where(few, found + factor[:, None] * (bounds - found), bounds))


def normal_equivalent(size: Array, spread: Array, df: Array) -> Array:
    """Sizes [N, 1] that are as rare for a normal distribution of `spread` [N, 1] as `size` for Student's t of df [N]."""
    from scipy import stats  # slow to import, and few runs need it

    few = np.isfinite(df)[:, None] & (spread > 0)
    t = np.divide(size, spread, out=np.zeros_like(size), where=few)
    return np.asarray(np.where(few, spread * stats.norm.isf(stats.t.sf(t, df[:, None])), size))


def student_equivalent(critical: float, df: Array) -> Array:
    """Critical values [N] of Student's t of df [N] that are as rare as `critical` is for a normal distribution."""
    from scipy import stats  # slow to import, and few runs need it

    return np.asarray(np.where(np.isfinite(df), stats.t.isf(stats.norm.sf(critical), df), critical))

"""A paired bootstrap over images: whether a difference in mean AP is more than chance."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ezhoi_diffusion.evaluation.average_precision import Algorithm, Scored, area, ranked
from ezhoi_diffusion.rng import generator

REPLICATES = 1000
REFERENCE = "none"  # bare EZ-HOI, the first variant of every comparison
LEVEL = 0.95
MIN_IMAGES = 3  # of a class; with fewer, 15 to 43 % of the intervals of a simulated null missed 0


@dataclass(frozen=True)
class Difference:
    """A difference in mean AP to another variant, in points: its interval, and two-sided p-values.

    Attributes:
        low: Lower bound of the interval.
        high: Upper bound of the interval.
        p: For this variant alone.
        p_adjusted: For all variants of the comparison together (max-T).
    """

    low: float
    high: float
    p: float
    p_adjusted: float


@dataclass(frozen=True, eq=False)
class BootstrapResult:
    """Results of a paired bootstrap for one variant and K classes.

    Attributes:
        mean_ap: Group -> interval of mean AP, in percent.
        over: `none` or a baseline -> group -> difference to it; without the variant itself.
        per_class: Interval of each class's difference to `none`, [K, 2] in points. NaN for a class annotated in fewer than
            three images. None for `none` itself.
    """

    mean_ap: dict[str, tuple[float, float]]
    over: dict[str, dict[str, Difference]]
    per_class: Tensor | None = None

    @property
    def difference(self) -> dict[str, Difference]:
        """Group -> difference to `none`; empty for `none` itself."""
        return self.over.get(REFERENCE, {})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; NaN becomes null."""
        bounds = [] if self.per_class is None else self.per_class.tolist()
        return {
            "mean_ap": {group: list(interval) for group, interval in self.mean_ap.items()},
            "over": {
                base: {group: asdict(found) for group, found in groups.items()} for base, groups in self.over.items()
            },
            "per_class": [None if low != low else [low, high] for low, high in bounds],
        }


def paired_bootstrap(
    scored: Mapping[str, Scored],
    annotations: Tensor,
    groups: Mapping[str, Tensor],
    *,
    baselines: Sequence[str] = (),
    algorithm: Algorithm = "11P",
    replicates: int = REPLICATES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, BootstrapResult]:
    """Estimate the uncertainty of mean AP and of its differences from the choice of the I images.

    Images are drawn with replacement, the same ones for every variant. An image drawn twice has its detections and
    annotations twice. A class without any annotation has an AP of zero, as EZ-HOI has it. A class whose images were not
    drawn is left out of that replicate's mean, and a bound is NaN where no replicate is left.

    Bounds are percentiles of the replicates (Efron & Tibshirani 1993, chapter 13). Those of mean AP, not of differences,
    are shifted by the bootstrap's bias: copies of a true positive follow each other, which raises AP where annotations are
    few. Without the shift, the mean AP of a made-up test set of HICO-DET's size lay outside its own interval.

    p is that of the bootstrap centred on the difference d that was found: P(|d* − d| >= |d|), counted as
    (1 + x) / (1 + replicates) (Davison & Hinkley 1997, chapter 4). p_adjusted compares |d| with the largest |d* − d| of
    any variant in the group, each in units of its standard deviation (single-step max-T: Westfall & Young 1993; Romano &
    Wolf 2005).

    Memory: int32 [I, replicates], and a few times [true positives of the largest class, replicates].

    Args:
        scored: Variant -> its detections. `none` is among them.
        annotations: Annotated pairs of each image and class, [I, K] int64.
        groups: Group -> classes [k] int64.
        baselines: Variants to which the others are compared too.
        algorithm: Of average precision.
        replicates: Number of resamplings.
        level: Of the intervals.
        seed: Of the draws.

    Returns:
        Variant -> its intervals and differences.

    Raises:
        ValueError: replicates < 1, or level is not between 0 and 1.
    """
    if replicates < 1 or not 0 < level < 1:
        raise ValueError(f"need replicates >= 1 and 0 < level < 1, not replicates={replicates}, level={level}")
    weights = _weights(len(annotations), replicates, seed)
    annotated = np.stack([n[n > 0] @ weights[n > 0] for n in annotations.T.numpy().astype(np.int32)])
    images_of = (annotations > 0).sum(0).numpy()
    variants = [REFERENCE, *(name for name in scored if name != REFERENCE)]
    means = np.empty((len(groups), len(variants), 1 + replicates))
    per_class: dict[str, Tensor] = {}
    for number, name in enumerate(tqdm(variants, desc="bootstrap", unit="variant", file=sys.stderr)):
        ap = 100 * _resampled_ap(scored[name], weights, annotated, algorithm)
        means[:, number] = [_mean(ap[index.numpy()]) for index in groups.values()]
        if name == REFERENCE:
            bare = ap
        else:
            interval = _interval(ap - bare, level)
            interval[images_of < MIN_IMAGES] = np.nan
            per_class[name] = torch.from_numpy(interval)
    mean_ap: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in variants}
    for group, mean in zip(groups, means, strict=True):
        off = _mean(mean[:, 1:].T) - mean[:, 0]
        bounds = (_interval(mean, level) - off[:, None]).clip(0, 100)
        for name, (low, high) in zip(variants, bounds.tolist(), strict=True):
            mean_ap[name][group] = low, high

    over: dict[str, dict[str, dict[str, Difference]]] = {name: {} for name in variants}
    for base in (REFERENCE, *baselines):
        at = variants.index(base)
        others = [name for name in variants if name != base]
        columns = [
            # One image, resampled, is itself and says nothing of chance.
            _differences(np.delete(mean, at, axis=0) - mean[at], level)
            if (annotations[:, index] > 0).any(1).sum() > 1
            else [Difference(-100.0, 100.0, 1.0, 1.0)] * len(others)
            for mean, index in zip(means, groups.values(), strict=True)
        ]
        for name, *found in zip(others, *columns, strict=True):
            over[name][base] = dict(zip(groups, found, strict=True))
    return {name: BootstrapResult(mean_ap[name], over[name], per_class.get(name)) for name in variants}


def _weights(images: int, replicates: int, seed: int) -> NDArray[np.int32]:
    """Counts of each image, [I, 1 + B]: once in the first column, the original sample; then as drawn."""
    draws = generator(seed, "bootstrap")
    weights = np.ones((images, 1 + replicates), np.int32)
    for replicate in range(1, 1 + replicates):
        weights[:, replicate] = torch.randint(images, (images,), generator=draws).bincount(minlength=images)
    return weights


def _resampled_ap(
    scored: Scored, weights: NDArray[np.int32], annotated: NDArray[np.int32], algorithm: Algorithm
) -> NDArray[np.float64]:
    """AP [K, 1 + B] in 0..1 of the images in each column of `weights`; NaN where those of a class were not drawn.

    annotated [K, 1 + B]: annotated pairs. Detections are ranked once.
    """
    from scipy.sparse import csr_array  # slow to import, and few runs need it

    ap = np.zeros(annotated.shape)
    for index, rows in ranked(scored):
        true = scored.labels[rows].nonzero().squeeze(1).numpy()
        if len(true):
            image = scored.image[rows[: true[-1] + 1]].numpy()
            between = csr_array(  # [true positives, I] the images of the detections since the true positive before
                (np.ones(len(image), np.int32), image, np.r_[0, true + 1]), shape=(len(true), len(weights))
            )
            detections = np.cumsum(between @ weights, axis=0, dtype=np.int32)
            ap[index] = area(weights[image[true]], detections, np.maximum(annotated[index], 1), algorithm)
    ap[(annotated == 0) & (annotated[:, :1] > 0)] = np.nan
    return ap


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean [R] over the rows of [N, R], NaN aside; NaN where there is nothing else."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nansum(values, axis=0) / (~np.isnan(values)).sum(0))


def _interval(values: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """Bounds [N, 2] that hold `level` of the replicates in [N, 1 + B], NaN aside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing but NaN
        return np.asarray(np.nanquantile(values[:, 1:], [(1 - level) / 2, (1 + level) / 2], axis=1).T)


def _differences(values: NDArray[np.float64], level: float) -> list[Difference]:
    """Interval and p-values of each of V variants, from its differences [V, 1 + B] to the reference in one group."""
    found, drawn = values[:, :1], values[:, 1:]
    drawn = drawn[:, ~np.isnan(drawn).any(0)]  # a replicate without any class of the group has it for no variant
    size, off = np.abs(found), np.abs(drawn - found)
    spread = drawn.std(axis=1, keepdims=True)
    # a variant that changes nothing has no spread, and no part in what is largest
    largest = np.divide(off, spread, out=np.zeros_like(off), where=spread > 0).max(0, initial=0)
    studentised = np.divide(size, spread, out=np.where(size > 0, np.inf, 0.0), where=spread > 0)
    count = 1 + drawn.shape[1]
    p = (1 + (off >= size).sum(1)) / count
    adjusted = (1 + (largest >= studentised).sum(1)) / count
    bounds = _interval(values, level)
    return [Difference(*row) for row in np.c_[bounds, p, adjusted].tolist()]

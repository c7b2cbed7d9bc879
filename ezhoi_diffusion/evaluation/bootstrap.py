"""Whether a difference in mean AP is more than chance: a paired bootstrap over images."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ezhoi_diffusion.evaluation.average_precision import RECALLS, Algorithm, Scored, ranked
from ezhoi_diffusion.rng import generator

REPLICATES = 1000
LEAST_IMAGES = 3  # of a class: with fewer, a made-up null put 15 to 43 % of its intervals beside 0


@dataclass(frozen=True)
class Difference:
    """A difference in mean AP to another variant, in points: its interval, and p-values (two-sided).

    p_adjusted holds for all variants of the comparison together, p for this one alone.
    """

    low: float
    high: float
    p: float
    p_adjusted: float


@dataclass(frozen=True, eq=False)
class Significance:
    """What a paired bootstrap says, for K interaction classes.

    mean_ap: variant -> group -> interval of mean AP, percent. difference: variant (all but the reference) -> group.
    per_class: variant (all but the reference) -> [K, 2] interval of the class's difference, points; NaN for a class
    annotated in fewer than three images. over: control -> variant (all but it) -> group, the difference to that control.
    """

    replicates: int
    level: float
    seed: int
    mean_ap: dict[str, dict[str, tuple[float, float]]]
    difference: dict[str, dict[str, Difference]]
    per_class: dict[str, Tensor]
    over: dict[str, dict[str, dict[str, Difference]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; NaN is null."""
        return {
            "replicates": self.replicates,
            "level": self.level,
            "seed": self.seed,
            "mean_ap": {v: {g: list(i) for g, i in groups.items()} for v, groups in self.mean_ap.items()},
            "difference": _as_json(self.difference),
            "over": {control: _as_json(difference) for control, difference in self.over.items()},
            "per_class": {
                v: [None if low != low else [low, high] for low, high in bounds.tolist()]
                for v, bounds in self.per_class.items()
            },
        }


def _as_json(difference: Mapping[str, Mapping[str, Difference]]) -> dict[str, Any]:
    return {v: {g: asdict(d) for g, d in groups.items()} for v, groups in difference.items()}


def paired_bootstrap(
    scored: Mapping[str, Scored],
    annotations: Tensor,
    groups: Mapping[str, Tensor],
    *,
    reference: str = "none",
    controls: Sequence[str] = (),
    algorithm: Algorithm = "11P",
    replicates: int = REPLICATES,
    level: float = 0.95,
    seed: int = 0,
) -> Significance:
    """How sure mean AP is, and its difference to that of `reference`, had the I images been others of their kind.

    scored: variant -> its detections. annotations [I, K] int64: annotated pairs of each image and class. groups: group
    -> classes [k] int64. controls: variants that the others are also held against. Images are drawn with replacement, the same for all variants, and an image drawn twice has all
    its detections and annotations twice. A class without any annotation has an AP of zero, as on the host; one whose
    images were not drawn is left out of that replicate's mean, and a bound is NaN where no replicate is left.

    Bounds are percentiles of the replicates (Efron & Tibshirani 1993, chapter 13). Those of mean AP, not of differences,
    are moved by as much as the replicates' mean is off what was found: copies of a true positive follow each other,
    which raises AP where annotations are few, so much that the mean AP of a made-up test set of HICO-DET's size lay
    outside of its own interval. They are for the mean AP on another test set of this size.
    p is that of the bootstrap centred on the difference d that was found: P(|d* - d| >= |d|), counted as
    (1 + x) / (1 + replicates) (Davison & Hinkley 1997, chapter 4). p_adjusted holds for all variants within the group:
    |d| is held against the largest |d* - d| of any variant, each in units of its standard deviation (single-step max-T:
    Westfall & Young 1993; Romano & Wolf 2005).

    Memory: int32 [I, replicates], and a few times [true positives of the largest class, replicates]. Raises ValueError
    for replicates < 1 and for a level that is not between 0 and 1.
    """
    if replicates < 1 or not 0 < level < 1:
        raise ValueError(f"need replicates >= 1 and 0 < level < 1, not replicates={replicates}, level={level}")
    weights = _weights(len(annotations), replicates, seed)
    annotated = np.stack([n[n > 0] @ weights[n > 0] for n in annotations.T.numpy().astype(np.int32)])
    images_of = (annotations > 0).sum(0).numpy()
    variants = [reference, *(name for name in scored if name != reference)]
    means = np.empty((len(groups), len(variants), 1 + replicates))
    per_class: dict[str, Tensor] = {}
    for number, name in enumerate(tqdm(variants, desc="bootstrap", unit="variant", file=sys.stderr)):
        ap = 100 * _resampled_ap(scored[name], weights, annotated, algorithm)
        means[:, number] = [_mean(ap[index.numpy()]) for index in groups.values()]
        if name == reference:
            bare = ap
        else:
            interval = _interval(ap - bare, level)
            interval[images_of < LEAST_IMAGES] = np.nan
            per_class[name] = torch.from_numpy(interval)
    mean_ap: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in variants}
    for group, mean in zip(groups, means, strict=True):
        off = _mean(mean[:, 1:].T) - mean[:, 0]
        bounds = (_interval(mean, level) - off[:, None]).clip(0, 100)
        for name, (low, high) in zip(variants, bounds.tolist(), strict=True):
            mean_ap[name][group] = low, high

    def over(base: str) -> dict[str, dict[str, Difference]]:
        at = variants.index(base)
        others = [name for name in variants if name != base]
        columns = [
            # one image resampled is itself, and says nothing of chance
            _differences(np.delete(mean, at, axis=0) - mean[at], level)
            if (annotations[:, index] > 0).any(1).sum() > 1
            else [Difference(-100.0, 100.0, 1.0, 1.0)] * len(others)
            for mean, index in zip(means, groups.values(), strict=True)
        ]
        return {name: dict(zip(groups, found, strict=True)) for name, *found in zip(others, *columns, strict=True)}

    return Significance(
        replicates, level, seed, mean_ap, over(reference), per_class, {control: over(control) for control in controls}
    )


def _weights(images: int, replicates: int, seed: int) -> NDArray[np.int32]:
    """How often each image is there, [I, 1 + B]: once in the first column, which is what was found; then as drawn."""
    draws = generator(seed, "bootstrap")
    weights = np.ones((images, 1 + replicates), np.int32)
    for replicate in range(1, 1 + replicates):
        weights[:, replicate] = torch.randint(images, (images,), generator=draws).bincount(minlength=images)
    return weights


def _resampled_ap(
    scored: Scored, weights: NDArray[np.int32], annotated: NDArray[np.int32], algorithm: Algorithm
) -> NDArray[np.float64]:
    """AP [K, 1 + B] in 0..1 of the images in each column of `weights`; NaN where those of a class were not drawn.

    annotated [K, 1 + B]: annotated pairs. Detections are ranked once. Between two true positives precision only falls
    and recall stays, so all that a replicate needs is what its curve has at each true positive.
    """
    from scipy.sparse import csr_array  # slow to import, and few runs need it

    area = {"11P": _eleven_point, "AUC": _under_curve, "VOC": _interpolated}[algorithm]
    ap = np.zeros(annotated.shape)
    for index, rows in ranked(scored):
        true = scored.labels[rows].nonzero().squeeze(1).numpy()
        if len(true):
            image = scored.image[rows[: true[-1] + 1]].numpy()
            between = csr_array(  # [true positives, I] the images of the detections since the true positive before
                (np.ones(len(image), np.int32), image, np.r_[0, true + 1]), shape=(len(true), len(weights))
            )
            detections = np.cumsum(between @ weights, axis=0, dtype=np.int32)
            ap[index] = area(weights[image[true]], detections, np.maximum(annotated[index], 1))
    ap[(annotated == 0) & (annotated[:, :1] > 0)] = np.nan
    return ap


def _eleven_point(
    copies: NDArray[np.int32], detections: NDArray[np.int32], annotated: NDArray[np.int32]
) -> NDArray[np.float64]:
    """AP [R] of R replicates as `average_precision` has it: of T true positives' copies and detections down to each [T, R]."""
    best = _best_precision(copies, detections)
    recall = np.cumsum(copies, axis=0, dtype=np.int32) / annotated
    at = np.stack([(recall < threshold).sum(0) for threshold in RECALLS.tolist()])
    precision = np.take_along_axis(best, np.minimum(at, len(best) - 1), axis=0)
    return np.asarray(np.where(at < len(best), precision, 0.0).sum(0) / len(RECALLS))


def _interpolated(
    copies: NDArray[np.int32], detections: NDArray[np.int32], annotated: NDArray[np.int32]
) -> NDArray[np.float64]:
    """As `_eleven_point`, with precision interpolated at every recall: over copies of a true positive precision rises."""
    return np.asarray((copies * _best_precision(copies, detections)).sum(0) / annotated)


def _best_precision(copies: NDArray[np.int32], detections: NDArray[np.int32]) -> NDArray[np.float64]:
    """The highest precision from the last copy of each true positive on, [T, R]."""
    true = np.cumsum(copies, axis=0, dtype=np.int32)
    return np.maximum.accumulate((true / np.maximum(detections, 1))[::-1])[::-1]


def _under_curve(
    copies: NDArray[np.int32], detections: NDArray[np.int32], annotated: NDArray[np.int32]
) -> NDArray[np.float64]:
    """As `_eleven_point`, for the area under the curve.

    The curve rises over c copies of a true positive, from t of n detections: its heights are (t + j) / (n + j), j = 0..c,
    that is 1 - (n - t) / (n + j), and the sum of these has a closed form in harmonic numbers. It begins at 1, if it
    begins with a true positive.
    """
    true = np.cumsum(copies, axis=0, dtype=np.int32)
    last = (copies > 0) & (true == true[-1])  # whose last copy does not count
    copies, true, detections = copies - last, true - last, detections - last
    before = detections - copies
    harmonic = np.r_[0, np.cumsum(1 / np.arange(1, 1 + detections.max()))]
    heights = copies - (detections - true) * (harmonic[detections] - harmonic[before])  # j = 1..c
    start = np.divide(true - copies, before, out=np.ones(true.shape), where=before > 0)  # j = 0
    end = np.divide(true, detections, out=np.ones(true.shape), where=detections > 0)  # j = c
    return np.asarray((heights + (start - end) / 2).sum(0) / annotated)


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
    """What is to be said of each of V variants, from its differences [V, 1 + B] to the reference in one group."""
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

"""A paired bootstrap over images and training seeds: whether a difference in mean AP is more than chance."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ezhoi_diffusion.evaluation.average_precision import Algorithm, Scored, area, ranked
from ezhoi_diffusion.evaluation.processes import in_processes
from ezhoi_diffusion.evaluation.seeds import (
    degrees_of_freedom,
    normal_equivalent,
    seed_weights,
    student_equivalent,
    widened,
)
from ezhoi_diffusion.rng import generator

REPLICATES = 1000
REFERENCE = "none"  # bare EZ-HOI, the first variant of every comparison
LEVEL = 0.95
POWER = 0.8  # of the minimal detectable effect
# Classes of fewer images get no interval: of 3 or 4 images, 20 or 15 % of simulated intervals missed the truth, not 5.
MIN_IMAGES = 10
UNKNOWN = 100.0  # points: AP cannot change by more


@dataclass(frozen=True)
class Difference:
    """A difference in mean AP to another bridge, in points: its intervals, and two-sided p-values.

    Attributes:
        low: Lower bound of the interval.
        high: Upper bound of the interval.
        p: For this bridge alone.
        p_adjusted: For all bridges of the comparison together (max-T).
        joint_low: Lower bound of the simultaneous interval: those of all bridges hold at once (max-T).
        joint_high: Upper bound of the simultaneous interval.
        standard_error: Standard deviation of the replicates.
    """

    low: float
    high: float
    p: float
    p_adjusted: float
    joint_low: float
    joint_high: float
    standard_error: float

    def detectable(self, level: float = LEVEL, power: float = POWER) -> float:
        """The smallest true difference that a test at `level` finds with probability `power`, in points.

        (z_{(1 + level)/2} + z_power)·SE, for a normal difference that is tested alone (Bloom, Evaluation Review 1995).
        """
        return (NormalDist().inv_cdf((1 + level) / 2) + NormalDist().inv_cdf(power)) * self.standard_error


ONE_IMAGE = Difference(
    -UNKNOWN, UNKNOWN, 1.0, 1.0, -UNKNOWN, UNKNOWN, UNKNOWN
)  # resampled, it is itself: chance is unknown


@dataclass(frozen=True, eq=False)
class BootstrapResult:
    """Results of a paired bootstrap for one bridge and K classes.

    Attributes:
        ap: Variant, each seed of the bridge -> AP of each class on the images as they are, [K] float64 in 0..1.
        mean_ap: Group -> interval of mean AP, in percent.
        over: `none` or a baseline -> group -> difference to it; without the bridge itself.
        per_class: Interval of each class's difference to `none`, [K, 2] in points. NaN for a class annotated in fewer than
            ten images. None for `none` itself.
        per_class_p: Two-sided p-value of each class, [K]; NaN and None as in `per_class`.
    """

    ap: dict[str, Tensor]
    mean_ap: dict[str, tuple[float, float]]
    over: dict[str, dict[str, Difference]]
    per_class: Tensor | None = None
    per_class_p: Tensor | None = None

    @property
    def difference(self) -> dict[str, Difference]:
        """Group -> difference to `none`; empty for `none` itself."""
        return self.over.get(REFERENCE, {})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; NaN becomes null."""
        bounds = [] if self.per_class is None else self.per_class.tolist()
        p_values = [] if self.per_class_p is None else self.per_class_p.tolist()
        return {
            "mean_ap": {group: list(interval) for group, interval in self.mean_ap.items()},
            "over": {
                base: {group: asdict(found) for group, found in groups.items()} for base, groups in self.over.items()
            },
            "per_class": [None if low != low else [low, high] for low, high in bounds],
            "per_class_p": [None if p != p else p for p in p_values],
        }


def paired_bootstrap(
    scored: Mapping[str, Scored],
    annotations: Tensor,
    groups: Mapping[str, Tensor],
    *,
    baselines: Sequence[str] = (),
    seed_groups: Mapping[str, Sequence[str]] | None = None,
    algorithm: Algorithm = "11P",
    replicates: int = REPLICATES,
    level: float = LEVEL,
    seed: int = 0,
    jobs: int = 1,
    advance: Callable[[], object] | None = None,
) -> dict[str, BootstrapResult]:
    """Estimate the uncertainty of mean AP and of its differences from the choice of the I images and of the training seeds.

    Images are drawn with replacement, the same ones for every variant. An image drawn twice has its detections and
    annotations twice. A class without any annotation has an AP of zero, as EZ-HOI has it. A class whose images were not
    drawn is left out of that replicate's mean, and a bound is NaN where no replicate is left.

    A bridge of n seeds has the mean of their AP, and in every replicate its seeds have weights too (`seeds.py`). Its
    variance is that of the images plus s²/n of the seeds.

    Bounds are percentiles of the replicates (Efron & Tibshirani 1993, chapter 13), shifted by the bootstrap's bias. Copies of a
    true positive follow each other, which raises AP where annotations are few. Without the shift, the mean AP of a made-up
    test set of HICO-DET's size lay outside its own interval, and so did the loss of a bridge that left little of it. Bounds of
    single classes are not shifted: in simulations that made them worse.

    p is that of the bootstrap centred on the difference d that was found: P(|d* − d| >= |d|), counted as
    (1 + x) / (1 + replicates) (Davison & Hinkley 1997, chapter 4). p_adjusted compares |d| with the largest |d* − d| of
    any bridge in the group, each in units of its standard deviation (single-step max-T: Westfall & Young 1993; Romano &
    Wolf 2005). A simultaneous interval is d ± c·SE, with c the quantile of these largest deviations.

    Where seeds vary, the variance has few degrees of freedom. Intervals are wider and p-values larger then, as Student's t
    has it. With one seed nothing of this changes a number.

    p of a single class is that of d / SE under Student's t, with as many degrees of freedom as images less one: the
    replicates resolve no p small enough for hundreds of classes.

    Memory: int32 [I, replicates], and a few times [true positives of the largest class, replicates].

    Args:
        scored: Variant -> its detections. `none` is among them.
        annotations: Annotated pairs of each image and class, [I, K] int32 or int64.
        groups: Group -> classes [k] int64.
        baselines: Bridges to which the others are compared too.
        seed_groups: Name of a bridge with several seeds -> names of its variants. Other variants are bridges of one.
        algorithm: Of average precision.
        replicates: Number of resamplings.
        level: Of the intervals.
        seed: Of the draws.
        jobs: Number of processes, for the variants.
        advance: Called after each variant, for a caller that shows the progress; by default it is shown here.

    Returns:
        Bridge -> its intervals and differences.

    Raises:
        ValueError: replicates < 1, or level is not between 0 and 1.
        EzhoiDiffusionError: One of several processes was killed.
    """
    if replicates < 1 or not 0 < level < 1:
        raise ValueError(f"need replicates >= 1 and 0 < level < 1, not replicates={replicates}, level={level}")
    weights = image_weights(len(annotations), replicates, seed)
    annotated = np.stack([n[n > 0] @ weights[n > 0] for n in annotations.int().T.numpy()])
    is_annotated = annotations > 0
    images_of = is_annotated.sum(0).numpy()
    bridges = _bridges([REFERENCE, *(name for name in scored if name != REFERENCE)], seed_groups or {})
    names = list(bridges)
    means = np.empty((len(groups), len(names), 1 + replicates))
    seed_variance = np.zeros((len(groups), len(names)))
    ap_of: dict[str, dict[str, Tensor]] = {}
    per_class: dict[str, tuple[Tensor, Tensor]] = {}
    progress = tqdm(total=len(scored), desc="bootstrap", unit="variant", file=sys.stderr, disable=advance is not None)
    advance = advance or progress.update
    # a variant that changes no score, such as `identity`, is resampled as bare EZ-HOI is
    changes = {name: name == REFERENCE or not _equal(scored[name], scored[REFERENCE]) for name in scored}
    tasks = (
        (_compact(scored[variant]) if jobs > 1 else scored[variant], weights, annotated, algorithm)
        for variants in bridges.values()
        for variant in variants
        if changes[variant]
    )
    resampled = in_processes(resampled_ap, tasks, jobs, here=0)
    bare = np.zeros(annotated.shape)  # until it is known: bare EZ-HOI comes first
    for number, (name, variants) in enumerate(bridges.items()):
        shares = seed_weights(len(variants), replicates, seed)
        ap, found = np.zeros(annotated.shape), []
        for variant, share in zip(variants, shares, strict=True):
            own = next(resampled) if changes[variant] else bare
            ap += share * own
            found.append(own[:, 0])
            advance()
        single = np.stack(found)  # [n, K]
        ap_of[name] = dict(zip(variants, torch.from_numpy(single), strict=True))
        means[:, number] = [100 * nan_mean(ap[index.numpy()]) for index in groups.values()]
        if len(variants) > 1:
            of_group = [100 * single[:, index.numpy()].mean(1) for index in groups.values()]
            seed_variance[:, number] = np.var(of_group, axis=1, ddof=1) / len(variants)
        if name == REFERENCE:
            bare = ap
        else:
            per_class[name] = _per_class(100 * (ap - bare), 100 * single, images_of, level)
    progress.close()
    freedom = np.array([len(variants) - 1 if len(variants) > 1 else np.inf for variants in bridges.values()])
    mean_ap: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in names}
    for group, mean, parts in zip(groups, means, seed_variance, strict=True):
        df = degrees_of_freedom(_spread(mean) ** 2, parts[:, None], freedom[:, None])
        bounds = widened(shifted_interval(mean, level), mean[:, :1], df, level).clip(0, 100)
        for name, (low, high) in zip(names, bounds.tolist(), strict=True):
            mean_ap[name][group] = low, high

    over: dict[str, dict[str, dict[str, Difference]]] = {name: {} for name in names}
    for base in (REFERENCE, *baselines):
        at = names.index(base)
        others = [number for number in range(len(names)) if number != at]
        columns = [
            _differences(
                mean[others] - mean[at],
                np.stack([parts[others], np.full(len(others), parts[at])], 1),
                np.stack([freedom[others], np.full(len(others), freedom[at])], 1),
                level,
            )
            if is_annotated[:, index].any(1).sum() > 1
            else [ONE_IMAGE] * len(others)
            for mean, parts, index in zip(means, seed_variance, groups.values(), strict=True)
        ]
        for number, *differences in zip(others, *columns, strict=True):
            over[names[number]][base] = dict(zip(groups, differences, strict=True))
    return {
        name: BootstrapResult(ap_of[name], mean_ap[name], over[name], *per_class.get(name, (None, None)))
        for name in names
    }


def _equal(a: Scored, b: Scored) -> bool:
    """Whether two variants have the same detections and scores."""
    return all(torch.equal(column, vars(b)[name]) for name, column in vars(a).items())


def _compact(scored: Scored) -> Scored:
    """A copy that is pickled without the room that its columns may have."""
    return Scored(**{name: column.clone() for name, column in vars(scored).items()})


def _bridges(variants: Sequence[str], seed_groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Bridge -> its variants, in the order of the variants."""
    bridge_of = {variant: name for name, seeds in seed_groups.items() for variant in seeds}
    bridges: dict[str, list[str]] = {}
    for variant in variants:
        bridges.setdefault(bridge_of.get(variant, variant), []).append(variant)
    return bridges


def image_weights(images: int, replicates: int, seed: int) -> NDArray[np.int32]:
    """Counts of each image, [I, 1 + B]: once in the first column, the original sample; then as drawn."""
    draws = generator(seed, "bootstrap")
    weights = np.ones((images, 1 + replicates), np.int32)
    for replicate in range(1, 1 + replicates):
        weights[:, replicate] = torch.randint(images, (images,), generator=draws).bincount(minlength=images)
    return weights


def resampled_ap(
    scored: Scored, weights: NDArray[np.int32], annotated: NDArray[np.int32], algorithm: Algorithm
) -> NDArray[np.float64]:
    """AP [K, 1 + B] in 0..1 of the images in each column of `weights`; NaN where those of a class were not drawn.

    annotated [K, 1 + B]: annotated pairs. Detections are ranked once.
    """
    from scipy.sparse import csr_array  # slow to import, and few runs need it

    ap = np.zeros(annotated.shape)
    for index, rows in ranked(scored):
        true = scored.labels[rows].nonzero().squeeze(1).numpy()
        if len(true) and annotated[index, 0]:
            image = scored.image[rows[: true[-1] + 1]].numpy()
            between = csr_array(  # [true positives, I] the images of the detections since the true positive before
                (np.ones(len(image), np.int32), image, np.r_[0, true + 1]), shape=(len(true), len(weights))
            )
            detections = np.cumsum(between @ weights, axis=0, dtype=np.int32)
            ap[index] = area(weights[image[true]], detections, np.maximum(annotated[index], 1), algorithm)
    ap[(annotated == 0) & (annotated[:, :1] > 0)] = np.nan
    return ap


def nan_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean [R] over the rows of [N, R], NaN aside; NaN where there is nothing else."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nansum(values, axis=0) / (~np.isnan(values)).sum(0))


def _interval(values: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """Bounds [N, 2] that hold `level` of the replicates in [N, 1 + B], NaN aside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing but NaN
        return np.asarray(np.nanquantile(values[:, 1:], [(1 - level) / 2, (1 + level) / 2], axis=1).T)


def shifted_interval(values: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """Bounds [N, 2] that hold `level` of the replicates in [N, 1 + B], NaN aside, around what was found, in the first column.

    The bias of the bootstrap, mean of the replicates less what was found, is taken from both.
    """
    return _interval(values, level) - (nan_mean(values[:, 1:].T) - values[:, 0])[:, None]


def _spread(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard deviation [N] of the replicates in [N, 1 + B], NaN aside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing but NaN
        return np.asarray(np.nanstd(values[:, 1:], axis=1))


def _per_class(
    change: NDArray[np.float64], seeds: NDArray[np.float64], images_of: NDArray[np.int64], level: float
) -> tuple[Tensor, Tensor]:
    """Interval [K, 2] and p-value [K] of each class, from differences [K, 1 + B] and the AP of n seeds [n, K]."""
    from scipy import stats  # slow to import, and few runs need it

    found, spread = change[:, :1], _spread(change)
    of_seeds = seeds.var(axis=0, ddof=1) / len(seeds) if len(seeds) > 1 else np.zeros(len(spread))
    of_images = np.maximum(spread**2 - of_seeds, 0)
    parts, seed_freedom = np.stack([of_images, of_seeds], 1), max(len(seeds) - 1, 1)
    freedom = np.stack([np.maximum(images_of - 1, 1), np.full(len(spread), seed_freedom)], 1).astype(float)
    df = degrees_of_freedom(spread**2, of_seeds[:, None], freedom[:, 1:])
    interval = widened(_interval(change, level), found, df, level)
    size = np.abs(found[:, 0])
    t = np.divide(size, spread, out=np.where(size > 0, np.inf, 0.0), where=spread > 0)
    p = 2 * stats.t.sf(t, degrees_of_freedom(spread**2, parts, freedom))
    few = images_of < MIN_IMAGES
    interval[few], p[few] = np.nan, np.nan
    return torch.from_numpy(interval), torch.from_numpy(p)


def _differences(
    values: NDArray[np.float64], parts: NDArray[np.float64], freedom: NDArray[np.float64], level: float
) -> list[Difference]:
    """Intervals and p-values of V bridges in one group.

    Args:
        values: Differences [V, 1 + B] to the reference, the one that was found first.
        parts: Variances of the means over seeds, of bridge and reference, [V, 2].
        freedom: Degrees of freedom of these, [V, 2].
        level: Of the intervals.
    """
    found, drawn = values[:, :1], values[:, 1:]
    drawn = drawn[:, ~np.isnan(drawn).any(0)]  # a replicate without any class of the group has it for no bridge
    off = np.abs(drawn - found)
    spread = drawn.std(axis=1, keepdims=True)
    df = degrees_of_freedom(spread[:, 0] ** 2, parts, freedom)
    size = normal_equivalent(np.abs(found), spread, df)
    # a bridge that changes nothing has no spread, and no part in what is largest
    largest = np.divide(off, spread, out=np.zeros_like(off), where=spread > 0).max(0, initial=0)
    studentised = np.divide(size, spread, out=np.where(size > 0, np.inf, 0.0), where=spread > 0)
    count = 1 + drawn.shape[1]
    p = (1 + (off >= size).sum(1)) / count
    adjusted = (1 + (largest >= studentised).sum(1)) / count
    bounds = widened(shifted_interval(values, level), found, df, level)
    critical = np.quantile(largest, level) if len(largest) else 0.0
    joint = found + student_equivalent(critical, df)[:, None] * spread * [-1, 1]
    return [Difference(*row) for row in np.c_[bounds, p, adjusted, joint, spread].tolist()]

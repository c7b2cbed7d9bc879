"""What a search for a chain of bridges will take."""

from __future__ import annotations

import sys
import time
from math import ceil

from tqdm import tqdm

from ezhoi_diffusion.evaluation.defaults import MIN_FOLDS
from ezhoi_diffusion.evaluation.remake import RemakeError
from ezhoi_diffusion.evaluation.search import Space, variations
from ezhoi_diffusion.evaluation.trials import Step, Trials

LONG = 600  # seconds, from which on the estimate says what makes it shorter


def estimate(trials: Trials, space: Space) -> str:
    """One line about the time to expect, from the first fits and the first images. What was fitted is used again.

    Every bridge that learns is made without one and without two folds of images, with all labels and without each fold of
    verbs. Each pass of a search goes over all images, and each of the `count` passes of the outer loop over all folds but one:
    `count` times all of them.
    """
    count, ways = len(trials.folds.images), 1 + len(trials.folds.classes)
    without_one, without_two = ways * count, ways * (count * (count - 1) // 2)
    smaller = (count - 2) / (count - 1)  # features that are left without two folds, as a share of those without one
    making, alone, as_is, parts = 0.0, [0.0], [0.0], range(len(trials.parts))
    at_once, readings = trials.chains_at_once(range(count)), 1
    for part in tqdm(parts, desc="estimate", unit="bridge", leave=False, file=sys.stderr):
        seeds, chain = max(1, len(trials.parts[part].learn)), (Step(part),)
        hidden = [None, 0] if trials.folds.classes else [None]
        begin = time.perf_counter()
        try:
            made = {trials.made[part, 0, frozenset({0}), one] for one in hidden}
        except RemakeError:  # the search says so
            continue
        seconds = (time.perf_counter() - begin) / len(hidden)
        making += seconds * seeds * (without_one + smaller * without_two)
        times = seeds * (ways if len(made) > 1 else 1)  # with all labels, and without those of each fold of verbs
        varied = list(variations(chain, space))
        alone.append(times * trials.seconds_a_pair(varied))
        as_is.append(times * trials.seconds_a_pair([chain]))
        readings += ceil(seeds * len(varied) / at_once)
    reading, scoring = trials.seconds_of_none()
    expected = space.expected_trials()
    applying = sum(alone)
    # In later rounds every bridge is tried at the end of the best chain, which is applied anew in each pass. Then the settings of
    # that chain are improved, each in a pass.
    for members in range(2, len(expected)):
        passes = ceil(len(parts) / at_once)
        applying += sum(as_is) + (passes * (members - 1) * sum(as_is) + members * sum(alone)) / len(parts)
        readings += passes + members * ceil(sum(map(len, space.grids)) / len(parts))
    seconds = making + (applying * len(trials.store) + readings * reading) * count
    seconds += 2 * scoring * sum(expected) * (1 + count)  # of seen classes, and of hidden ones
    fewer = f"--folds {MIN_FOLDS}, " if count > MIN_FOLDS else ""
    shorter = f". Fewer --num-images, {fewer}fewer --bridges or more --jobs make it shorter" if seconds > LONG else ""
    return (
        f"{len(trials.parts)} bridges, {count} folds of images and {ways - 1} of verbs: each bridge that learns is made "
        f"{without_one + without_two} times, and about {sum(expected) * (1 + count)} chains are scored. Estimate: about "
        f"{seconds / 60:.1f} minutes in one process{shorter}"
    )

"""The search for a chain of bridges, and the rule that chooses one or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ezhoi_diffusion.evaluation.bootstrap import LEVEL
from ezhoi_diffusion.evaluation.comparison import REFERENCE
from ezhoi_diffusion.evaluation.trials import Chain, Samples, Step, Trial

MAX_MEMBERS = 3  # of a chain that the search builds
Grid = Mapping[str, Sequence[Any]]
Run = Callable[[Chain], Trial | None]  # None where a bridge of the chain cannot be made


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        items: Chains that are built on, by positions of their bridges; most have one bridge.
        baselines: Positions of the baselines, which are tried alone.
        grids: Setting -> values, for each bridge.
    """

    items: list[tuple[int, ...]]
    baselines: list[int]
    grids: Sequence[Grid]

    def max_trials(self) -> int:
        """An upper bound of the number of trials of a search."""
        values = [sum(map(len, grid.values())) for grid in self.grids]
        alone = sum(1 + values[part] for part in self.baselines)
        grown = sum(2 + sum(values[part] for part in item) for item in self.items)
        rounds = min(MAX_MEMBERS, len(self.items))
        longest = sorted((sum(values[part] for part in item) for item in self.items), reverse=True)
        return 1 + alone + rounds * grown + sum(sum(longest[: 1 + round_]) for round_ in range(rounds))


def search(space: Space, run: Run) -> dict[str, Trial]:
    """Try chains greedily. Returns all trials by name; the first is `none`.

    Baselines are tried alone, each as it is and with one setting changed at a time. Then the best chain grows: every other
    item is appended, as it is and with one setting changed at a time, or put in front. The best of these is kept if it
    exceeds the chain before, and its settings are improved one after the other.
    """
    trials: dict[str, Trial] = {}

    def tried(chains: Iterable[Chain]) -> list[Trial]:
        found = [trial for trial in map(run, chains) if trial is not None]
        trials.update({trial.name: trial for trial in found})
        return found

    (best,) = tried([()])
    tried(chain for part in space.baselines for chain in _variations((Step(part),), space.grids))
    for _ in range(MAX_MEMBERS):
        used = {step.part for step in best.chain}
        grown: list[Chain] = []
        for item in space.items:
            if used.isdisjoint(item):
                tail = tuple(Step(part) for part in item)
                grown += [best.chain + chain for chain in _variations(tail, space.grids)]
                grown += [tail + best.chain] if best.chain else []
        leader = max(tried(grown), key=lambda trial: float(trial.value[0]), default=best)
        if not leader.value[0] > best.value[0]:
            break
        best = leader
        for number, step in enumerate(best.chain):
            for key, values in space.grids[step.part].items():
                for value in values:
                    others = tried([_changed(best.chain, number, key, value)])
                    best = max([best, *others], key=lambda trial: float(trial.value[0]))
    return trials


def _variations(chain: Chain, grids: Sequence[Grid]) -> Iterator[Chain]:
    """The chain as it is, and with one setting changed."""
    yield chain
    for number, step in enumerate(chain):
        for key, values in grids[step.part].items():
            yield from (_changed(chain, number, key, value) for value in values)


def _changed(chain: Chain, number: int, key: str, value: Any) -> Chain:
    settings = tuple(sorted({**dict(chain[number].settings), key: value}.items()))
    return (*chain[:number], replace(chain[number], settings=settings), *chain[number + 1 :])


# -- the rule ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lead:
    """A difference of the criterion, in points: its interval, and a p-value that is adjusted for all candidates."""

    difference: float
    low: float
    high: float
    p: float

    @property
    def is_gain(self) -> bool:
        """Whether it is a gain beyond chance."""
        return self.low > 0 and self.p < 1 - LEVEL


@dataclass(frozen=True, eq=False)
class Choice:
    """What the rule chose.

    Attributes:
        trial: The chosen trial; `none` or a baseline where no bridge helps.
        helps: Whether it is a bridge that gains over `none` and over the best baseline, both beyond chance.
        leader: The bridge with the highest criterion; None where there is no bridge.
        baseline: The baseline with the highest criterion, `none` among them.
        leads: Leads of `leader` over `none` and over `baseline`, by their names.
        why: One sentence.
    """

    trial: Trial
    helps: bool
    leader: Trial | None
    baseline: Trial
    leads: dict[str, Lead]
    why: str


def choose(trials: Mapping[str, Trial]) -> Choice:
    """The simplest bridge within one standard error of the best, if it gains over `none` and every baseline beyond chance.

    The standard error is that of the difference between the two, from the same resampled images. The simpler of two chains has
    fewer bridges; with as many, it changes the logits less. Without such a bridge the best baseline is chosen if it gains
    beyond chance, and `none` otherwise.
    """
    none = trials[REFERENCE]
    baselines = [trial for trial in trials.values() if trial.baseline]
    bridges = [trial for trial in trials.values() if not trial.baseline]
    baseline = max(baselines, key=lambda trial: float(trial.value[0]))
    rivals = [none] if baseline is none else [none, baseline]
    leads = {rival.name: leads_over(rival, bridges) for rival in rivals}
    leader = max(bridges, key=lambda trial: float(trial.value[0]), default=None)
    of_leader = {name: found[leader.name] for name, found in leads.items()} if leader is not None else {}
    winners = [trial for trial in bridges if all(found[trial.name].is_gain for found in leads.values())]
    if winners:
        best = max(winners, key=lambda trial: float(trial.value[0]))
        near = [trial for trial in winners if best.value[0] - trial.value[0] <= _standard_error(best, trial)]
        chosen = min(near, key=lambda trial: (len(trial.chain), trial.change))
        beaten = " and ".join(rival.name for rival in rivals)
        return Choice(chosen, True, leader, baseline, of_leader, f"{chosen.name} gains over {beaten} beyond chance.")
    others = [trial for trial in baselines if trial is not none]
    gains = leads_over(none, others)
    if baseline is not none and gains[baseline.name].is_gain:
        why = f"No bridge gains over the baseline {baseline.name} beyond chance, and that baseline gains over none."
        return Choice(baseline, False, leader, baseline, of_leader, why)
    return Choice(
        none, False, leader, baseline, of_leader, "No bridge gains over none and every baseline beyond chance."
    )


def leads_over(rival: Trial, trials: Sequence[Trial]) -> dict[str, Lead]:
    """The lead of each trial over `rival`.

    p is that of the bootstrap centred on what was found, adjusted by the largest deviation of any of the trials (single-step
    max-T: Westfall & Young 1993; Romano & Wolf 2005).
    """
    if not trials:
        return {}
    values: NDArray[np.float64] = np.stack([trial.value - rival.value for trial in trials])
    found, drawn = values[:, :1], values[:, 1:]
    drawn = drawn[:, ~np.isnan(drawn).any(0)]
    spread = drawn.std(axis=1, keepdims=True)
    off, size = (
        np.divide(np.abs(part), spread, out=np.zeros_like(part), where=spread > 0) for part in (drawn - found, found)
    )
    p = (1 + (off.max(0, initial=0) >= size).sum(1)) / (1 + drawn.shape[1])
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    rows = np.c_[found, low, high, p].tolist()
    return {trial.name: Lead(*row) for trial, row in zip(trials, rows, strict=True)}


def lead_of(value: Samples, over: Samples) -> Lead:
    """The lead of one criterion [1 + B] over another."""
    trials = [Trial((), name, one, one, one, 0.0, False) for name, one in (("a", value), ("b", over))]
    return leads_over(trials[1], trials[:1])["a"]


def _standard_error(one: Trial, other: Trial) -> float:
    return float(np.nanstd((one.value - other.value)[1:]))

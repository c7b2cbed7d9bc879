"""The search for a chain of bridges, and the rule that chooses one or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ezhoi_diffusion.evaluation.bootstrap import LEVEL, shifted_interval
from ezhoi_diffusion.evaluation.comparison import REFERENCE
from ezhoi_diffusion.evaluation.passes import distinct
from ezhoi_diffusion.evaluation.trials import Chain, Samples, Step, Trial

MAX_MEMBERS = 3  # of a chain that the search builds
Grid = Mapping[str, Sequence[Any]]
Run = Callable[[Sequence[Chain]], list[Trial | None]]  # None where a bridge of the chain cannot be made


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        items: Chains that are built on, by positions of their bridges; most have one bridge.
        baselines: Positions of the baselines, which are tried alone.
        grids: Setting -> values, for each bridge.
        own: Setting -> the value that the bridge has already, for each bridge; a chain does not name it.
        names: Registered name of each bridge. A chain has each name once.
        on_scores: Whether each bridge works on what a feature scores. It comes after those that expect features of EZ-HOI.
    """

    items: list[tuple[int, ...]]
    baselines: list[int]
    grids: Sequence[Grid]
    own: Sequence[Mapping[str, Any]]
    names: Sequence[str]
    on_scores: Sequence[bool]

    def expected_trials(self) -> list[int]:
        """Number of trials of a search that finds something in every round: of `none` and baselines, then of each round."""
        values = [
            sum(value != own.get(key) for key, some in grid.items() for value in some)
            for grid, own in zip(self.grids, self.own, strict=True)
        ]
        trials = [1 + sum(1 + values[part] for part in self.baselines)]
        of_item = [sum(values[part] for part in item) for item in self.items]
        per_item = sum(of_item) / max(1, len(self.items))
        for members in range(1, 1 + min(MAX_MEMBERS, len(self.items))):
            grown = len(self.items) - members + 1
            trials.append(round(grown + (members * per_item if members > 1 else sum(of_item))))
        return trials


def search(space: Space, run: Run) -> dict[str, Trial]:
    """Try chains greedily. Returns all trials by name; the first is `none`.

    Every item is tried alone, as it is and with one setting changed at a time. The best chain then grows by one item at a time,
    each with the settings that were best alone. The best of these is kept if it exceeds the chain before, and its settings are
    improved one after the other.
    """
    done: list[tuple[Chain, Trial | None]] = []  # no dictionary: values of settings may be lists

    def tried(chains: Iterable[Chain]) -> list[Trial]:
        wanted = list(chains)
        new = [chain for chain in distinct(wanted) if not any(other == chain for other, _ in done)]
        done.extend(zip(new, run(new) if new else [], strict=True))
        found = [next(trial for other, trial in done if other == chain) for chain in wanted]
        return [trial for trial in found if trial is not None]

    (best,) = tried([()])
    tried(chain for part in space.baselines for chain in variations((Step(part),), space))
    alone = [tried(variations(tuple(Step(part) for part in item), space)) for item in space.items]
    items = [max(trials, key=_value).chain for trials in alone if trials]
    for _ in range(MAX_MEMBERS):
        used = {space.names[step.part] for step in best.chain}
        grown = [
            _grown(best.chain, item, space)
            for item in items
            if used.isdisjoint(space.names[step.part] for step in item)
        ]
        leader = max(tried(grown), key=_value, default=best)
        if not leader.value[0] > best.value[0]:
            break
        best = leader
        for number, step in enumerate(best.chain):
            for key, values in space.grids[step.part].items():
                changed = [_changed(best.chain, number, key, value, space) for value in values]
                best = max([best, *tried(changed)], key=_value)
    return {trial.name: trial for _, trial in done if trial is not None}


def _value(trial: Trial) -> float:
    return float(trial.value[0])


def _grown(chain: Chain, item: Chain, space: Space) -> Chain:
    """The chain with an item at its end, or before the first bridge on scores if the item has none."""
    scores = [space.on_scores[step.part] for step in chain]
    if any(space.on_scores[step.part] for step in item) or not any(scores):
        return chain + item
    first = scores.index(True)
    return chain[:first] + item + chain[first:]


def variations(chain: Chain, space: Space) -> Iterator[Chain]:
    """The chain as it is, and with one setting changed."""
    yield chain
    for number, step in enumerate(chain):
        for key, values in space.grids[step.part].items():
            yield from (_changed(chain, number, key, value, space) for value in values)


def _changed(chain: Chain, number: int, key: str, value: Any, space: Space) -> Chain:
    step = chain[number]
    settings = {**dict(step.settings), key: value}
    if value == space.own[step.part].get(key):
        del settings[key]
    return (*chain[:number], replace(step, settings=tuple(sorted(settings.items()))), *chain[number + 1 :])


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
        helps: Whether it is a bridge that gains over `none` and over every baseline, each beyond chance.
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
    leads = {rival.name: leads_over(rival, bridges) for rival in baselines}
    leader = max(bridges, key=lambda trial: float(trial.value[0]), default=None)
    shown = dict.fromkeys((none.name, baseline.name))
    of_leader = {name: leads[name][leader.name] for name in shown} if leader is not None else {}
    winners = [trial for trial in bridges if all(found[trial.name].is_gain for found in leads.values())]
    if winners:
        best = max(winners, key=lambda trial: float(trial.value[0]))
        near = [trial for trial in winners if best.value[0] - trial.value[0] <= _standard_error(best, trial)]
        chosen = min(near, key=lambda trial: (len(trial.chain), trial.change))
        why = f"{chosen.name} gains over none and every baseline beyond chance."
        return Choice(chosen, True, leader, baseline, of_leader, why)
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
    rows = np.c_[found, shifted_interval(values, LEVEL), p].tolist()
    return {trial.name: Lead(*row) for trial, row in zip(trials, rows, strict=True)}


def lead_of(value: Samples, over: Samples) -> Lead:
    """The lead of one criterion [1 + B] over another."""
    trials = [Trial((), name, one, one, one, 0.0, False) for name, one in (("a", value), ("b", over))]
    return leads_over(trials[1], trials[:1])["a"]


def _standard_error(one: Trial, other: Trial) -> float:
    return float(np.nanstd((one.value - other.value)[1:]))

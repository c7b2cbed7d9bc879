"""Chains of bridges, scored on images and classes that no member was fitted to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ezhoi_diffusion.bridge import Bridge
from ezhoi_diffusion.evaluation.average_precision import Scored
from ezhoi_diffusion.evaluation.bootstrap import image_weights, nan_mean, resampled_ap
from ezhoi_diffusion.evaluation.comparison import REFERENCE
from ezhoi_diffusion.evaluation.folds import Folds, TuneError, protocol_of, seen_classes
from ezhoi_diffusion.evaluation.held_out import blocks_of
from ezhoi_diffusion.evaluation.passes import Found, Settings, scored_block, tree_of
from ezhoi_diffusion.evaluation.processes import in_processes
from ezhoi_diffusion.evaluation.remake import Recipes, Remade, RemakeError
from ezhoi_diffusion.features.rows import StoredRows
from ezhoi_diffusion.features.score import EzHoiScore
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.plugins import PluginManager

MAX_SCORES = 2**24  # of detections in one pass, of all its chains together: at most 10 bytes each
Samples = NDArray[np.float64]  # [1 + B], what was found and then the replicates


@dataclass(frozen=True)
class Step:
    """One bridge of a chain: its position among the recipes, and the settings that are not its own."""

    part: int
    settings: Settings = ()


Chain = tuple[Step, ...]


@dataclass(frozen=True, eq=False)
class Trial:
    """A chain on held-out data. All figures are in percent.

    Attributes:
        chain: The bridges.
        name: What tables call it.
        value: The criterion: the two below, weighed by `Folds.class_weight`.
        seen: Mean AP of seen classes on images that no fit saw.
        hidden: The same, where no fit saw labels of the verb either; NaN without class folds.
        change: Root mean square of what it adds to EZ-HOI's logits.
        baseline: Whether all its bridges are there to be beaten.
    """

    chain: Chain
    name: str
    value: Samples
    seen: Samples
    hidden: Samples
    change: float
    baseline: bool


class Trials:
    """Makes each bridge once for every part of the data, and scores chains of them.

    Args:
        store: A capture of the train split.
        parts: How the bridges are made.
        bridges: Each of them, made from all data: what it says of itself counts.
        folds: The folds.
        replicates: B, resamplings of the images of a trial.
        plugins: The plugin manager.
        device: Where the bridges get their features.
        jobs: Number of processes that fit and apply bridges.
    """

    def __init__(
        self,
        store: FeatureStore,
        parts: Sequence[Recipes],
        bridges: Sequence[Bridge],
        folds: Folds,
        *,
        replicates: int,
        plugins: PluginManager,
        device: torch.device | str = "cpu",
        jobs: int = 1,
    ) -> None:
        self.store, self.parts, self.bridges, self.folds = store, parts, bridges, folds
        self.replicates, self.device, self.jobs = replicates, device, jobs
        self.score = EzHoiScore.from_store(store)
        self.seen = seen_classes(store)
        self.blocks = blocks_of(store, folds.images, protocol_of(store), self.seen)
        self.features, self.logits = StoredRows(store), StoredRows(store, name="logits")
        self.annotations = _annotations(store, self.seen)
        if not all(self.annotations[fold].nnz for fold in folds.images):
            raise TuneError(
                f"{store.folder}: one of {len(folds.images)} folds has no annotation of a seen class in its {len(folds.images[-1])} "
                f"images: choose on more images, or with fewer folds"
            )
        self.made = Remade(store, parts, bridges, folds, plugins, device, jobs)
        self._resampled: tuple[tuple[tuple[int, ...], int, int], NDArray[np.int32], NDArray[np.int32]] | None = None

    def name(self, chain: Chain) -> str:
        """`a[key=value]+b`, or `none`."""
        words = []
        for step in chain:
            settings = ",".join(f"{key}={value}" for key, value in step.settings)
            words.append(self.parts[step.part].label + (f"[{settings}]" if settings else ""))
        return "+".join(words) or REFERENCE

    def seeds(self, chain: Chain) -> int:
        """How many bridges the chain stands for."""
        return max((len(self.parts[step.part].learn) for step in chain), default=1) or 1

    def run(self, chains: Sequence[Chain], outer: int | None = None) -> list[Trial]:
        """Score chains. What those in one pass have in common is computed once. Of several seeds the mean counts.

        Args:
            chains: The bridges of each.
            outer: A fold of images that neither fits nor scores may know.
        """
        folds = [fold for fold in range(len(self.folds.images)) if fold != outer]
        seeds = [(number, seed) for number, chain in enumerate(chains) for seed in range(self.seeds(chain))]
        seeds.sort(key=itemgetter(1))  # in one pass come chains of one seed, which share bridges
        figures = self.figures([(chains[number], seed) for number, seed in seeds], folds, outer)
        found = []
        for number, chain in enumerate(chains):
            of_seeds = [one for (of, _), one in zip(seeds, figures, strict=True) if of == number]
            values = np.mean([criterion for criterion, _ in of_seeds], axis=0)
            change = float(np.mean([change for _, change in of_seeds]))
            baseline = all(self.bridges[step.part].baseline for step in chain)
            found.append(Trial(chain, self.name(chain), values[0], values[1], values[2], change, baseline))
        return found

    def figures(
        self,
        chains: Sequence[tuple[Chain, int]],
        folds: Sequence[int],
        outer: int | None = None,
        *,
        replicates: int | None = None,
        seed: int = 0,
    ) -> list[tuple[tuple[Samples, Samples, Samples], float]]:
        """Score chains on the images of some folds, by bridges that know neither the fold nor `outer`.

        A pass takes as many chains as MAX_SCORES allows, and at least one.

        Args:
            chains: Bridges, and the seed that they are made with.
            folds: Folds of images.
            outer: As for `run`.
            replicates: Resamplings of the images; by default those of a trial.
            seed: Of the draws.

        Returns:
            For each chain what `criterion` returns, and the root mean square change of the logits.

        Raises:
            EzhoiDiffusionError: A bridge cannot be made, breaks a rule, or cannot be sent to another process.
        """
        at_once = self.chains_at_once(folds)
        found = []
        for first in range(0, len(chains), at_once):
            found += [
                (self.criterion(of_seen, of_hidden, folds, replicates, seed), change)
                for of_seen, of_hidden, change in self._scored(chains[first : first + at_once], folds, outer)
            ]
        return found

    def chains_at_once(self, folds: Sequence[int]) -> int:
        """How many chains are scored in one pass over some folds, one or more."""
        of_chain = sum(len(block.detections.classes) for fold in folds for block in self.blocks[fold])
        return max(1, MAX_SCORES // max(1, of_chain))

    def _scored(
        self, chains: Sequence[tuple[Chain, int]], folds: Sequence[int], outer: int | None
    ) -> list[tuple[Scored, Scored, float]]:
        """For each chain the detections of seen classes, those of hidden ones, and the root mean square change of the logits."""
        parts = range(len(self.folds.classes))
        made = {
            fold: [
                {hidden: self._made_for(chain, seed, fold, outer, hidden) for hidden in (None, *parts)}
                for chain, seed in chains
            ]
            for fold in folds
        }
        differs = [
            any(one != of[n][None] for of in made.values() for one in of[n].values()) for n in range(len(chains))
        ]
        trees = {
            fold: tree_of(
                [
                    ((number, part), self._steps(chain), bridges)
                    for number, (chain, _) in enumerate(chains)
                    for part, bridges in made[fold][number].items()
                    if part is None or bridges != made[fold][number][None]
                ]
            )
            for fold in folds
        }
        blocks = [(fold, block) for fold in folds for block in self.blocks[fold]]
        tasks = (
            (self.score, trees[fold], self.features[block.rows], self.logits[block.rows], block, self.device)
            for fold, block in blocks
        )
        detections = Found([block.detections for _, block in blocks], self.folds.classes, differs)
        squares, size = [0.0] * len(chains), 0
        for (_, block), (found, of_block) in zip(blocks, in_processes(scored_block, tasks, self.jobs), strict=True):
            size += len(block.rows) * self.logits.shape[1]
            for number, square in of_block.items():
                squares[number] += square
            detections.add(block.detections, found)
        return [(*detections.scored(number), (square / size) ** 0.5) for number, square in enumerate(squares)]

    def _made_for(self, chain: Chain, seed: int, fold: int, outer: int | None, hidden: int | None) -> list[Bridge]:
        return [self.made[step.part, seed, without_of(fold, outer), hidden] for step in chain]

    def _steps(self, chain: Chain) -> list[tuple[str, Settings]]:
        return [(self.parts[step.part].label, step.settings) for step in chain]

    def problems(self, chains: Sequence[Chain], outer: int | None) -> list[RemakeError | None]:
        """Why each chain cannot be made from the data that it may know, or None. What can be made is kept."""
        wanted = [
            [
                (step.part, seed, without_of(fold, outer), hidden)
                for fold in range(len(self.folds.images))
                for seed in range(self.seeds(chain))
                for hidden in (None, *range(len(self.folds.classes)))
                for step in chain
                if fold != outer
            ]
            for chain in chains
        ]
        self.made.prepare([key for keys in wanted for key in keys])
        return [next(filter(None, map(self.made.problem, keys)), None) for keys in wanted]

    def seconds_a_pair(self, chains: Sequence[Chain]) -> float:
        """What applying chains takes for one pair, in passes as `figures` makes them, on the first images of the first fold."""
        block, without = self.blocks[0][0], frozenset({0})
        applied = [
            ((number, None), self._steps(chain), [self.made[step.part, 0, without, None] for step in chain])
            for number, chain in enumerate(chains)
        ]
        at_once = self.chains_at_once(range(len(self.folds.images)))
        trees = [tree_of(applied[first : first + at_once]) for first in range(0, len(applied), at_once)]
        x, before = self.features[block.rows], self.logits[block.rows]
        for _ in range(2):  # the first call also prepares what later ones find
            begin = time.perf_counter()
            for tree in trees:
                scored_block(self.score, tree, x, before, block, self.device)
        return (time.perf_counter() - begin) / len(x)

    def seconds_of_none(self) -> tuple[float, float]:
        """What a pass without a bridge takes, and to score its detections."""
        folds = range(len(self.folds.images))
        begin = time.perf_counter()
        [(seen, hidden, _)] = self._scored([((), 0)], folds, None)
        reading = time.perf_counter() - begin
        for _ in range(2):  # the first call also draws the resamplings, which all trials share
            begin = time.perf_counter()
            self.criterion(seen, hidden, folds)
        return reading, time.perf_counter() - begin

    def criterion(
        self, seen: Scored, hidden: Scored, folds: Sequence[int], replicates: int | None = None, seed: int = 0
    ) -> tuple[Samples, Samples, Samples]:
        """Criterion, mean AP of seen classes, and of hidden ones, on the images of some folds, each [1 + B] in percent."""
        weights, annotated = self._resampling(tuple(folds), self.replicates if replicates is None else replicates, seed)
        counts = np.flatnonzero(annotated[:, 0] > 0)
        of_seen = 100 * nan_mean(resampled_ap(seen, weights, annotated, "11P")[counts])
        if not self.folds.classes:
            return of_seen, of_seen, np.full_like(of_seen, np.nan)
        of_hidden = (
            of_seen if hidden is seen else 100 * nan_mean(resampled_ap(hidden, weights, annotated, "11P")[counts])
        )
        share = self.folds.class_weight
        return (1 - share) * of_seen + share * of_hidden, of_seen, of_hidden

    def _resampling(
        self, folds: tuple[int, ...], replicates: int, seed: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Counts of each image, [I, 1 + B], and annotated pairs of each class, [K, 1 + B]. Other folds count nothing."""
        key = folds, replicates, seed
        if self._resampled is None or self._resampled[0] != key:  # one is held: of many images it is large
            counted = sorted(position for fold in folds for position in self.folds.images[fold])
            weights = np.zeros((self.annotations.shape[0], 1 + replicates), np.int32)
            weights[counted] = image_weights(len(counted), replicates, seed)
            self._resampled = key, weights, self.annotations.T @ weights
        return self._resampled[1:]


def _annotations(store: FeatureStore, classes: Tensor) -> Any:
    """Annotated pairs of some classes [k] in each image, a sparse array [I, K] int32."""
    from scipy.sparse import csr_array  # slow to import

    number = torch.tensor([image["annotations"] for image in store.images])
    hoi = store.rows("gt_hoi").long()
    usable = torch.isin(hoi, classes)
    image = torch.arange(len(number)).repeat_interleave(number)[usable]
    num_classes = int(store.ezhoi["object_n_verb_to_interaction"].max()) + 1
    # it sums what is at one place
    return csr_array(
        (np.ones(len(image), np.int32), (image.numpy(), hoi[usable].numpy())), shape=(len(number), num_classes)
    )


def without_of(fold: int, outer: int | None) -> frozenset[int]:
    """The folds of images that a bridge must not know to be scored on `fold`."""
    return frozenset({fold} if outer is None else {fold, outer})

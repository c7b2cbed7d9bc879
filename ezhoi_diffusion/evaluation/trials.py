"""Chains of bridges, scored on images and classes that no member was fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.bridge import Bridge
from ezhoi_diffusion.evaluation.average_precision import Scored
from ezhoi_diffusion.evaluation.bootstrap import image_weights, nan_mean, resampled_ap
from ezhoi_diffusion.evaluation.comparison import REFERENCE
from ezhoi_diffusion.evaluation.folds import Folds, HeldOut, protocol_of, seen_classes
from ezhoi_diffusion.evaluation.remake import Recipes
from ezhoi_diffusion.evaluation.variants import Variant
from ezhoi_diffusion.features.score import EzHoiScore
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.plugins import PluginManager

MAX_SHARED = 1 << 30
Samples = NDArray[np.float64]  # [1 + B], what was found and then the replicates
Settings = tuple[tuple[str, Any], ...]


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
        grids: Setting -> values that are tried, for each.
        folds: The folds.
        replicates: B, resamplings of the images of a trial.
        plugins: The plugin manager.
        device: Where the bridges get their features.
    """

    def __init__(
        self,
        store: FeatureStore,
        parts: Sequence[Recipes],
        bridges: Sequence[Bridge],
        grids: Sequence[Mapping[str, Sequence[Any]]],
        folds: Folds,
        *,
        replicates: int,
        plugins: PluginManager,
        device: torch.device | str = "cpu",
    ) -> None:
        self.store, self.parts, self.bridges, self.grids, self.folds = store, parts, bridges, grids, folds
        self.replicates, self.plugins, self.device = replicates, plugins, device
        self.score = EzHoiScore.from_store(store)
        self.seen = seen_classes(store)
        protocol = protocol_of(store)
        self.held_out = [HeldOut.of_images(store, fold, protocol, self.seen, device) for fold in folds.images]
        num_classes = int(store.ezhoi["object_n_verb_to_interaction"].max()) + 1
        counts = torch.zeros(len(store.images), num_classes, dtype=torch.long)
        number = torch.tensor([image["annotations"] for image in store.images])
        hoi = store.rows("gt_hoi").long()
        usable = torch.isin(hoi, self.seen)
        image = torch.arange(len(number)).repeat_interleave(number)[usable]
        counts.index_put_((image, hoi[usable]), torch.tensor(1), accumulate=True)
        self.annotations = counts.numpy().astype(np.int32)
        self._made: dict[tuple[int, int, frozenset[int], int | None], tuple[Bridge, Artifact | None]] = {}
        self._swept: tuple[int, dict[Bridge, list[tuple[Settings, Bridge]]]] = 0, {}
        self._resampled: dict[tuple[int | None, int], tuple[NDArray[np.int32], NDArray[np.int32]]] = {}

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

    def run(self, chain: Chain, outer: int | None = None) -> Trial:
        """Score a chain; of several seeds, each, and the mean counts.

        Args:
            chain: The bridges.
            outer: A fold of images that neither fits nor scores may know.
        """
        folds = [fold for fold in range(len(self.folds.images)) if fold != outer]
        found = [self.scored(chain, seed, folds, outer) for seed in range(self.seeds(chain))]
        values = np.mean([self.criterion(seen, hidden, outer) for seen, hidden, _ in found], axis=0)
        change = float(np.mean([change for _, _, change in found]))
        baseline = all(self.bridges[step.part].baseline for step in chain)
        return Trial(chain, self.name(chain), values[0], values[1], values[2], change, baseline)

    def scored(
        self, chain: Chain, seed: int, folds: Sequence[int], outer: int | None = None
    ) -> tuple[Scored, Scored, float]:
        """Detections on the images of some folds by bridges that know neither the fold nor `outer`.

        Returns:
            Those of seen classes, those of classes whose labels were hidden, and the mean square change of the logits.
        """
        seen, hidden, squares, size, differs = [], [], 0.0, 0, False
        for fold in folds:
            held_out, without = self.held_out[fold], frozenset({fold} if outer is None else {fold, outer})
            bridges = [self.made(step.part, seed, without) for step in chain]
            logits = self._logits(chain, bridges, fold)
            seen.append(held_out.scored(logits))
            squares += float((logits - held_out.logits).double().square().sum())
            size += logits.numel()
            for number, classes in enumerate(self.folds.classes):
                others = [self.made(step.part, seed, without, number) for step in chain]
                is_same = all(one is other for one, other in zip(bridges, others, strict=True))
                differs |= not is_same
                hidden.append(held_out.scored(logits if is_same else self._logits(chain, others, fold), classes))
        of_seen = joined(seen)
        return of_seen, joined(hidden) if differs else of_seen, (squares / size) ** 0.5

    def criterion(
        self, seen: Scored, hidden: Scored, outer: int | None, replicates: int | None = None
    ) -> tuple[Samples, Samples, Samples]:
        """Criterion, mean AP of seen classes, and of hidden ones, each [1 + B] in percent."""
        weights, annotated = self._resampling(outer, self.replicates if replicates is None else replicates)
        counts = np.flatnonzero(annotated[:, 0] > 0)
        of_seen = 100 * nan_mean(resampled_ap(seen, weights, annotated, "11P")[counts])
        if not self.folds.classes:
            return of_seen, of_seen, np.full_like(of_seen, np.nan)
        of_hidden = (
            of_seen if hidden is seen else 100 * nan_mean(resampled_ap(hidden, weights, annotated, "11P")[counts])
        )
        share = self.folds.class_weight
        return (1 - share) * of_seen + share * of_hidden, of_seen, of_hidden

    def _resampling(self, outer: int | None, replicates: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Counts of each image, [I, 1 + B], and annotated pairs of each class, [K, 1 + B]. Images of `outer` count nothing."""
        if (outer, replicates) not in self._resampled:
            folds = [images for fold, images in enumerate(self.folds.images) if fold != outer]
            counted = sorted(position for images in folds for position in images)
            weights = np.zeros((len(self.annotations), 1 + replicates), np.int32)
            weights[counted] = image_weights(len(counted), replicates, 0)
            annotated = np.stack([n[n > 0] @ weights[n > 0] for n in self.annotations.T])
            self._resampled[outer, replicates] = weights, annotated
        return self._resampled[outer, replicates]

    def _logits(self, chain: Chain, bridges: Sequence[Bridge], fold: int) -> Tensor:
        if not chain:
            return self.held_out[fold].logits
        first = self._first(chain[0], bridges[0], self.held_out[fold].features.nbytes)
        others = [bridge.override(**dict(step.settings)) for step, bridge in zip(chain[1:], bridges[1:], strict=True)]
        variants = [
            Variant(self.parts[step.part].label, bridge) for step, bridge in zip(chain, (first, *others), strict=True)
        ]
        return self.score.logits(self.held_out[fold].bridged(variants))

    def _first(self, step: Step, bridge: Bridge, size: int) -> Bridge:
        """The first bridge of a chain, with the settings of its step. `size`: bytes of the features that it gets.

        They are the same ones each time, so what its settings have in common is computed once. As many copies of the features as
        there are values may be held for that: up to MAX_SHARED bytes, and for one bridge at a time.
        """
        if self._swept[0] != step.part:
            self._swept = step.part, {}
        known, grid = self._swept[1], self.grids[step.part]
        if bridge not in known:
            count = 1 + sum(map(len, grid.values()))
            if (1 + len(known)) * count * size > MAX_SHARED:
                return bridge.override(**dict(step.settings))
            points: list[Settings] = [(), *(((key, value),) for key, values in grid.items() for value in values)]
            known[bridge] = list(zip(points, bridge.sweep([dict(point) for point in points]), strict=True))
        found = [one for point, one in known[bridge] if point == step.settings]
        return found[0] if found else bridge.override(**dict(step.settings))

    def made(self, part: int, seed: int, without: frozenset[int], hidden: int | None = None) -> Bridge:
        """A bridge made without some folds of images, and without the labels of one fold of classes.

        Each is made once. Where the labels make no difference it is the bridge that was made with them.
        """
        recipes = self.parts[part]
        if not recipes.learn:
            return self.bridges[part]
        key = (part, seed % len(recipes.learn), without, hidden)
        if key not in self._made:
            left = {position for fold in without for position in self.folds.images[fold]}
            kept = [position for position in range(len(self.store.images)) if position not in left]
            known = self.store.subset(kept, None if hidden is None else self.folds.classes[hidden])
            bridge, artifact = recipes.make(known, self.plugins, seed)
            if hidden is not None:
                same = self.made(part, seed, without)
                _, with_labels = self._made[part, key[1], without, None]
                if _equal(artifact, with_labels):
                    bridge = same
            self._made[key] = bridge.to(self.device), artifact
        return self._made[key][0]


def _equal(one: Artifact | None, other: Artifact | None) -> bool:
    if one is None or other is None:
        return one is other
    files = one.files.keys() == other.files.keys() and all(
        tensors.keys() == other.files[name].keys()
        and all(torch.equal(tensor, other.files[name][key]) for key, tensor in tensors.items())
        for name, tensors in one.files.items()
    )
    return one.config == other.config and files


def joined(parts: Sequence[Scored]) -> Scored:
    """Detections of several folds together."""
    return Scored(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("scores", "classes", "labels", "image"))
    )

"""A pass over held-out images: several chains of bridges are applied and scored, and what they have in common is computed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ezhoi_diffusion.bridge import Bridge
from ezhoi_diffusion.evaluation.average_precision import Scored
from ezhoi_diffusion.evaluation.held_out import Block
from ezhoi_diffusion.evaluation.protocols import Detections
from ezhoi_diffusion.evaluation.variants import Variant
from ezhoi_diffusion.features.score import EzHoiScore

T = TypeVar("T")
Settings = tuple[tuple[str, Any], ...]
Key = tuple[int, int | None]  # number of a chain, and of the fold of verbs whose labels its bridges do not know
Applied = tuple[Key, Sequence[tuple[str, Settings]], Sequence[Bridge]]  # name and settings of each bridge of a chain


@dataclass(frozen=True, eq=False)
class Tree:
    """Chains that begin alike: those that end here, and the next bridges of the others."""

    ending: list[Key]
    following: list[tuple[Variant, Tree]]


def tree_of(chains: Sequence[Applied]) -> Tree:
    """Chains as a tree in which each bridge comes once, and the settings of a bridge are points of one sweep."""
    following: list[tuple[Variant, Tree]] = []
    alike: dict[Bridge, list[Applied]] = {}
    for chain in chains:
        if chain[1]:
            alike.setdefault(chain[2][0], []).append(chain)
    for bridge, some in alike.items():
        points = distinct(steps[0][1] for _, steps, _ in some)
        for point, swept in zip(points, bridge.sweep([dict(point) for point in points]), strict=True):
            here = [(key, steps, bridges) for key, steps, bridges in some if steps[0][1] == point]
            rest = tree_of([(key, steps[1:], bridges[1:]) for key, steps, bridges in here])
            following.append((Variant(here[0][1][0][0], swept), rest))
    return Tree([key for key, steps, _ in chains if not steps], following)


def distinct(items: Iterable[T]) -> list[T]:
    """Each item once, in order. They need not be hashable: values of settings may be lists."""
    found: list[T] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


@torch.no_grad()
def scored_block(
    score: EzHoiScore, tree: Tree, x: Tensor, before: Tensor, block: Block, device: torch.device | str
) -> tuple[dict[Key, tuple[Tensor, Tensor]], dict[int, float]]:
    """Score a block's detections after each chain.

    Args:
        score: EZ-HOI's score.
        tree: The chains.
        x: Features [n, D] of the block, on the CPU.
        before: EZ-HOI's logits [n, C].
        block: Its images.
        device: Where the bridges get their features.

    Returns:
        Scores [M] and labels [M] of each chain, and the sum of the squared changes of the logits by the chain's number.
    """
    found: dict[Key, tuple[Tensor, Tensor]] = {}
    squares: dict[int, float] = {}
    given = x.to(device)
    for (number, part), after in _bridged(tree, given, block):
        logits = before if torch.equal(after, given) else score.class_logits(after.cpu())
        scores = block.detections.scores(logits)
        found[number, part] = scores, block.detections.labels(scores)
        if part is None:
            squares[number] = float((logits - before).double().square().sum())
    return found, squares


def _bridged(tree: Tree, x: Tensor, block: Block) -> Iterator[tuple[Key, Tensor]]:
    """Yield the features [n, D] of a block after each chain."""
    for key in tree.ending:
        yield key, x
    for variant, rest in tree.following:
        yield from _bridged(rest, block.bridged(variant, x), block)


class Found:
    """Detections of several chains on the same blocks: with bridges that know all labels, and with those that lack their own.

    Both have one order, so classes and images are held once. Each chain adds at most ten bytes for a detection. The order is that
    of the classes, so that ranking need not sort by them again for every chain.

    Args:
        detections: Those of each block, in the order in which they will be added.
        classes: Classes [k] of each fold of verbs; every detection has its class in one of them.
        differs: For each chain, whether some of its bridges learn from labels that are hidden.
    """

    def __init__(self, detections: Sequence[Detections], classes: Sequence[Tensor], differs: Sequence[bool]) -> None:
        self._classes, order = torch.cat([one.classes for one in detections]).sort(stable=True)
        self._image = torch.cat([one.image for one in detections])[order]
        self._place = torch.empty(len(order), dtype=torch.int32)  # of each detection as they come
        self._place[order] = torch.arange(len(order), dtype=torch.int32)
        self._folds, self._differs, self._end = classes, differs, 0
        # in one piece each: small ones that come and go leave gaps in the memory
        shape = 2, len(differs), len(self._classes)
        self._scores, self._labels = torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.bool)

    def add(self, detections: Detections, found: Mapping[Key, tuple[Tensor, Tensor]]) -> None:
        """Add the scores [m] float32 and labels [m] bool of a block by each chain."""
        end = self._end + len(detections.classes)
        here = self._place[self._end : end].long()
        in_fold = [torch.isin(detections.classes, classes) for classes in self._folds] if any(self._differs) else []
        for number, differs in enumerate(self._differs):
            self._scores[0, number, here], self._labels[0, number, here] = found[number, None]
            for part, kept in enumerate(in_fold if differs else ()):
                scores, labels = found.get((number, part), found[number, None])
                self._scores[1, number, here[kept]] = scores[kept]
                self._labels[1, number, here[kept]] = labels[kept]
        self._end = end

    def scored(self, number: int) -> tuple[Scored, Scored]:
        """Those of a chain: of seen classes, and of hidden ones. The same one twice if no bridge learns from hidden labels."""
        of_seen, of_hidden = (
            Scored(scores[number], self._classes, labels[number], self._image)
            for scores, labels in zip(self._scores, self._labels, strict=True)
        )
        return of_seen, of_hidden if self._differs[number] else of_seen

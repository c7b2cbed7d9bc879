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
    """Detections of several chains, by their numbers, on the same pairs: block by block, until `scored` takes them out."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._shared: list[tuple[Tensor, Tensor]] = []
        self._own: dict[int, list[tuple[Tensor, Tensor]]] = {number: [] for number in numbers}

    def add(self, detections: Detections, kept: Tensor | slice, found: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Add some detections of a block, kept [M] bool, with scores [M] and labels [M] of each chain."""
        if self._own:
            self._shared.append((detections.classes[kept], detections.image[kept]))
        for number, own in self._own.items():
            scores, labels = found[number]
            own.append((scores[kept], labels[kept]))

    def scored(self) -> dict[int, Scored]:
        """Those of each chain. Nothing of them is kept here."""
        if not self._own:
            return {}
        classes, image = (torch.cat(column) for column in zip(*self._shared, strict=True))
        found = {}
        for number in [*self._own]:
            scores, labels = (torch.cat(column) for column in zip(*self._own.pop(number), strict=True))
            found[number] = Scored(scores, classes, labels, image)
        return found

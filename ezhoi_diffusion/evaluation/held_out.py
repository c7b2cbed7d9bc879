"""The images of a fold, in blocks that are bridged and scored again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import torch
from torch import Tensor

from ezhoi_diffusion.evaluation.application import check_row_by_row
from ezhoi_diffusion.evaluation.protocols import Detections, EvalProtocol
from ezhoi_diffusion.evaluation.replay import MAX_PAIRS
from ezhoi_diffusion.evaluation.variants import Variant
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.features.images import StoredImage, stored_images
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.inputs import read_only

Parts = Sequence[tuple[slice, Pairs]]


@dataclass(frozen=True, eq=False)
class Block:
    """Some images of one fold, about MAX_PAIRS pairs.

    Attributes:
        rows: Positions of the pairs in the store [n] int64.
        groups: Images of one size together: their span of the n pairs, and these pairs as if of one image.
        images: Name, number of pairs and number of boxes of each image, group by group.
        detections: Those of classes that count. `image` has positions in the store. What each detection has is in int32, because those
            of all images are held all the time.
    """

    rows: Tensor
    groups: Parts
    images: list[list[tuple[str | None, int, int]]]
    detections: Detections

    @classmethod
    def of_images(cls, images: Sequence[_Placed], protocol: EvalProtocol, classes: Tensor) -> Block:
        """Join images. Their pairs are matched with annotations, and detections of other classes are left out."""
        images = sorted(images, key=_size_of)
        groups, counts, begin = [], [], 0
        for _, same in groupby(images, key=_size_of):
            members = [placed.image.pairs for placed in same]
            counts.append([(pairs.image, len(pairs), len(pairs.boxes)) for pairs in members])
            merged = _merged(members)
            groups.append((slice(begin, begin + len(merged)), merged))
            begin += len(merged)
        rows = [torch.arange(placed.row, placed.row + len(placed.image.pairs)) for placed in images]
        found = Detections.from_images([placed.image for placed in images], protocol.match)
        position = torch.tensor([placed.position for placed in images])
        return cls(torch.cat(rows), groups, counts, _of_classes(replace(found, image=position[found.image]), classes))

    def bridged(self, variant: Variant, x: Tensor) -> Tensor:
        """Features [n, D] after a bridge. Raises EzhoiDiffusionError where it depends on other images and says row_by_row."""
        if not variant.bridge.row_by_row:
            return _in_parts(variant, x, list(self._singly()))
        if variant.takes_many_images:
            with read_only(f"bridge '{variant.name}'", adapter_feat=x):
                after = variant.apply(x, None)
        else:
            after = _in_parts(variant, x, self.groups)
        rows, pairs = next(self._singly())
        check_row_by_row(variant.name, pairs.image, _in_parts(variant, x[rows], [(slice(None), pairs)]), after[rows])
        return after

    def _singly(self) -> Iterator[tuple[slice, Pairs]]:
        """Yield the span of each image, and its pairs."""
        for (span, pairs), images in zip(self.groups, self.images, strict=True):
            row = box = 0
            for name, rows, boxes in images:
                yield slice(span.start + row, span.start + row + rows), _taken(pairs, name, row, rows, box, boxes)
                row, box = row + rows, box + boxes


@dataclass(frozen=True, eq=False)
class _Placed:
    """An image without its features, its position in the store, and that of its first pair."""

    image: StoredImage
    position: int
    row: int


def blocks_of(
    store: FeatureStore, folds: Sequence[Sequence[int]], protocol: EvalProtocol, classes: Tensor
) -> list[list[Block]]:
    """Deal the images of each fold into blocks of images that are alike in size. Images without pairs are left out.

    Args:
        store: A capture of the train split.
        folds: Positions of the images in each fold.
        protocol: Which annotations count.
        classes: Interaction classes whose detections count [k].
    """
    fold_of = {position: fold for fold, positions in enumerate(folds) for position in positions}
    waiting: list[dict[tuple[int, ...], list[_Placed]]] = [{} for _ in folds]
    blocks: list[list[Block]] = [[] for _ in folds]
    row = 0
    for position, image in enumerate(stored_images(store)):
        fold, placed = fold_of[position], _Placed(_without_features(image), position, row)
        row += len(image.pairs)
        if len(image.pairs):
            alike = waiting[fold].setdefault(_size_of(placed), [])
            alike.append(placed)
            if _is_full(alike):
                blocks[fold].append(Block.of_images(waiting[fold].pop(_size_of(placed)), protocol, classes))
    for fold, left in enumerate(waiting):
        together: list[_Placed] = []
        for size in sorted(left):
            together += left[size]
            if _is_full(together):
                blocks[fold].append(Block.of_images(together, protocol, classes))
                together = []
        if together:
            blocks[fold].append(Block.of_images(together, protocol, classes))
    return blocks


def _is_full(images: Sequence[_Placed]) -> bool:
    return sum(len(placed.image.pairs) for placed in images) >= MAX_PAIRS


def _without_features(image: StoredImage) -> StoredImage:
    """What matching needs, in memory of its own."""
    pairs = image.pairs
    own = {name: getattr(pairs, name).clone() for name in ("size", "boxes", "scores", "classes", "pairing")}
    none = image.adapter_feat.new_empty(0)
    return replace(
        image, adapter_feat=none, logits=none, labels=none, pairs=replace(pairs, **own),
        gt_boxes=image.gt_boxes.clone(), gt_hoi=image.gt_hoi.clone(),
    )  # fmt: skip


def _size_of(placed: _Placed) -> tuple[int, ...]:
    return tuple(placed.image.pairs.size.tolist())


def _merged(members: Sequence[Pairs]) -> Pairs:
    """The pairs of images of one size as those of one image."""
    first_box = accumulate((len(pairs.boxes) for pairs in members), initial=0)
    boxes, scores, classes = (torch.cat([getattr(one, n) for one in members]) for n in ("boxes", "scores", "classes"))
    pairing = torch.cat([pairs.pairing + begin for pairs, begin in zip(members, first_box, strict=False)], 1)
    return Pairs(None, 0, members[0].size, boxes, scores, classes, pairing)


def _taken(pairs: Pairs, name: str | None, row: int, rows: int, box: int, boxes: int) -> Pairs:
    """One image's pairs: `rows` of them from `row` on, with `boxes` boxes from `box` on."""
    of_boxes = {column: getattr(pairs, column)[box : box + boxes] for column in ("boxes", "scores", "classes")}
    return replace(pairs, image=name, **of_boxes, pairing=pairs.pairing[:, row : row + rows] - box)


def _in_parts(variant: Variant, x: Tensor, parts: Parts) -> Tensor:
    after = torch.empty_like(x)
    # around all calls, because a bridge may keep pairs and write in a later one; the features are copies
    with read_only(f"bridge '{variant.name}'", pairs=[pairs for _, pairs in parts]):
        for rows, pairs in parts:
            after[rows] = variant.apply(x[rows].clone(), pairs)
    return after


def _of_classes(found: Detections, classes: Tensor) -> Detections:
    """The detections of some classes only; candidates belong to those already."""
    kept = torch.isin(found.classes, classes)
    number = kept.cumsum(0) - 1
    return replace(
        found,
        **{name: getattr(found, name)[kept].int() for name in ("row", "target", "classes", "image")},
        prior=found.prior[kept],
        candidate=number[found.candidate],
    )

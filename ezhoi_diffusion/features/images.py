"""The images of a feature store, one at a time, or those of a shard together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.features.store import FeatureStore


@dataclass(frozen=True, eq=False)
class StoredImage:
    """One image of a store, with its annotations.

    Attributes:
        name: File name.
        adapter_feat: Pair features [P, D].
        logits: EZ-HOI's logits [P, C].
        pairs: Boxes, detector scores and object classes.
        labels: Annotations of each pair by IoU, [P, C] bool.
        gt_boxes: Annotated human and object boxes, [G, 2, 4].
        gt_hoi: Annotated interaction classes [G].
    """

    name: str | None
    adapter_feat: Tensor
    logits: Tensor
    pairs: Pairs
    labels: Tensor
    gt_boxes: Tensor
    gt_hoi: Tensor


def stored_images(store: FeatureStore, chosen: set[int] | None = None) -> Iterator[StoredImage]:
    """Yield the images of a store in order, or those at `chosen` positions. Raises FeatureStoreError for a damaged shard."""
    position = 0
    for shard, tensors in zip(store.index["shards"], store.shards(), strict=True):
        at = {"rows": 0, "boxes": 0, "annotations": 0}
        for number, image in enumerate(shard["images"]):
            span = {what: slice(begin, begin + image[what]) for what, begin in at.items()}
            at = {what: piece.stop for what, piece in span.items()}
            if chosen is None or position in chosen:
                rows, boxes, annotations = span["rows"], span["boxes"], span["annotations"]
                pairs = Pairs(
                    image["name"], 0, tensors["sizes"][number], tensors["boxes"][boxes], tensors["scores"][boxes],
                    tensors["classes"][boxes].long(), tensors["pairing"][rows].long().T,
                )  # fmt: skip
                yield StoredImage(
                    image["name"], tensors["adapter_feat"][rows], tensors["logits"][rows], pairs, tensors["labels"][rows],
                    tensors["gt_boxes"][annotations], tensors["gt_hoi"][annotations].long(),
                )  # fmt: skip
            position += 1


def shard_pairs(entry: dict[str, Any], shard: dict[str, Tensor]) -> Pairs:
    """All pairs of a shard, as if they were of one image.

    Args:
        entry: The shard in the index.
        shard: Its tensors.
    """
    first_box = torch.tensor([0, *(image["boxes"] for image in entry["images"][:-1])]).cumsum(0)
    pairing = shard["pairing"].long() + first_box[image_of(entry, "rows")].unsqueeze(1)
    return Pairs(None, 0, shard["sizes"], shard["boxes"], shard["scores"], shard["classes"].long(), pairing.T)


def image_of(entry: dict[str, Any], what: Literal["rows", "boxes", "annotations"]) -> Tensor:
    """[n] int64, the position within a shard of the image of each of its pairs, boxes or annotations."""
    counts = torch.tensor([image[what] for image in entry["images"]])
    return torch.arange(len(counts)).repeat_interleave(counts)

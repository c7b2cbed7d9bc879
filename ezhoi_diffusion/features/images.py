"""The images of a feature store, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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

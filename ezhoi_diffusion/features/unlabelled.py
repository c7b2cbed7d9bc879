"""Features without annotations: all that a fit may see of test images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor

from ezhoi_diffusion.features.store import FeatureStore

ANNOTATIONS = ("labels", "gt_boxes", "gt_hoi")
F = TypeVar("F", bound=Callable[..., Any])


class Unlabelled(FeatureStore):
    """A view of a capture as if its images had never been annotated. Its shards lack `ANNOTATIONS`."""

    def __init__(self, whole: FeatureStore) -> None:
        self.folder, self.meta, self.ezhoi = whole.folder, whole.meta, whole.ezhoi
        self._whole: FeatureStore = whole
        shards = [
            {**shard, "images": [{**image, "annotations": 0} for image in shard["images"]]}
            for shard in whole.index["shards"]
        ]
        self.index = {**whole.index, "shards": shards}

    def shards(self) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of each shard, without annotations. Raises FeatureStoreError where one was changed."""
        for shard in self._whole.shards():
            yield {name: tensor for name, tensor in shard.items() if name not in ANNOTATIONS}


def learns_from_test_images(fit: F) -> F:
    """Mark a fit that gets a capture of test images, without their annotations. Its bridge is test-transductive."""
    fit.__dict__["split"] = "test"
    return fit


def split_of(fit: Callable[..., Any]) -> Literal["train", "test"]:
    """The split whose images a fit learns from: "train", or "test" where it is marked."""
    function = fit.func if isinstance(fit, partial) else fit
    split: Literal["train", "test"] = getattr(function, "split", "train")
    return split

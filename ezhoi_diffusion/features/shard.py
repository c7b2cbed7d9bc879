"""Some images of a capture in memory, which become one file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.features.batch import FeatureBatch, Pairs

LARGEST_IMAGE = 512  # pairs of an image for which there is still room in a shard that is nearly full
LARGE = {"adapter_feat": torch.float32, "logits": torch.float32, "labels": torch.bool}


class Shard:
    """Images that become one shard. What is large of them stands in buffers, which are used again for other images.

    From a GPU the copies go into pinned memory, behind what the host has queued there, and nobody waits for them but
    `keep_finite`.
    """

    def __init__(self, rows: int) -> None:
        self.images: list[FeatureBatch] = []
        self.rows = 0
        self._room = rows + LARGEST_IMAGE
        self._buffers: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def has_room(self, rows: int) -> bool:
        """Whether an image of so many pairs fits; the first one always does."""
        return not self.images or self.rows + rows <= self._room

    def add(self, batch: FeatureBatch) -> None:
        """Copy an image to the CPU; its tensors may change afterwards."""
        pairs = batch.pairs
        moved = {k: _to_cpu(getattr(pairs, k)) for k in ("size", "boxes", "scores", "classes", "pairing")}
        own = {k: _to_cpu(getattr(batch, k)) for k in ("gt_boxes", "gt_hoi")}
        large = {k: self._buffered(k, getattr(batch, k)) for k in LARGE}
        if batch.adapter_feat.is_cuda:
            self._copied = self._copied or torch.cuda.Event(blocking=True)  # who waits for it shall not spin
            self._copied.record(torch.cuda.current_stream(batch.adapter_feat.device))
        kept = Pairs(pairs.image, pairs.batch_index, **moved)
        self.images.append(FeatureBatch(index=batch.index, pairs=kept, text=None, **own, **large))
        self.rows += len(pairs)

    def _buffered(self, name: str, value: Tensor) -> Tensor:
        begin, end, width = self.rows, self.rows + len(value), value.shape[1]
        found = self._buffers.get(name)
        if found is None or (begin == 0 and (end > len(found) or found.shape[1] != width)):
            room = max(self._room, end)
            found = torch.empty(room, width, dtype=LARGE[name], pin_memory=value.is_cuda)
            self._buffers[name] = found
        return found[begin:end].copy_(value, non_blocking=True)

    def keep_finite(self) -> str | None:
        """Drop the first image that could not be read back, and what is after it; returns what is wrong with it, or None."""
        if self._copied is not None:
            self._copied.synchronize()
        for number, batch in enumerate(self.images):
            problem = _not_finite(batch)
            if problem:
                del self.images[number:]
                self.rows = sum(len(kept.pairs) for kept in self.images)
                return problem
        return None

    def clear(self) -> None:
        """Make room for other images."""
        self.images, self.rows = [], 0

    def tensors(self) -> dict[str, Tensor]:
        """What stands in a shard's file."""
        images = self.images
        return {
            **{name: buffer[: self.rows] for name, buffer in self._buffers.items()},
            "pairing": torch.cat([b.pairs.pairing.T for b in images]).to(torch.int32),
            "objects": torch.cat([b.pairs.objects for b in images]).to(torch.int32),
            "boxes": torch.cat([b.pairs.boxes for b in images]).float(),
            "scores": torch.cat([b.pairs.scores for b in images]).float(),
            "classes": torch.cat([b.pairs.classes for b in images]).to(torch.int32),
            "sizes": torch.stack([b.pairs.size for b in images]).to(torch.int32),
            "gt_boxes": torch.cat([b.gt_boxes.transpose(0, 1) for b in images]).float(),
            "gt_hoi": torch.cat([b.gt_hoi for b in images]).to(torch.int32),
        }

    def entries(self) -> list[dict[str, Any]]:
        """What the index says of each image."""
        return [
            {
                "index": batch.index,
                "name": batch.image,
                "rows": len(batch.pairs),
                "boxes": len(batch.pairs.boxes),
                "annotations": len(batch.gt_hoi),
            }
            for batch in self.images
        ]


def _to_cpu(x: Tensor) -> Tensor:
    return x.to("cpu", copy=True, non_blocking=x.is_cuda)  # from a GPU this is pinned memory, too


def _not_finite(batch: FeatureBatch) -> str | None:
    """What of an image could not be read back, or None."""
    if not torch.isfinite(batch.adapter_feat).all():
        return f"image {batch.image} gave features that are not finite: does the bare host score it?"
    for name, value in (
        ("logits", batch.logits),
        ("boxes", batch.pairs.boxes),
        ("scores", batch.pairs.scores),
        ("gt_boxes", batch.gt_boxes),
    ):
        if not torch.isfinite(value).all():
            return f"image {batch.image} has {name} that are not finite: does the bare host score it? Look at its annotation"
    return None

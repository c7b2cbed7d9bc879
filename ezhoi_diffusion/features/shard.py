"""Images of a capture in memory that become one file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.features.batch import FeatureBatch, Pairs
from ezhoi_diffusion.features.contents import SHARD
from ezhoi_diffusion.schema import box_problem, range_problem

MAX_IMAGE_PAIRS = 512  # a nearly full shard still has room for an image of this many pairs
LARGE = {"adapter_feat": torch.float32, "logits": torch.float32, "labels": torch.bool}


class Shard:
    """Images that become one shard. Large tensors are copied into buffers, which the next images reuse.

    Copies from a GPU go into pinned memory, on EZ-HOI's stream. Only `keep_valid` waits for them.
    """

    def __init__(self, rows: int) -> None:
        self.images: list[FeatureBatch] = []
        self.rows = 0
        self._room = rows + MAX_IMAGE_PAIRS
        self._buffers: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def has_room(self, rows: int) -> bool:
        """Whether an image with this many pairs fits; the first one always does."""
        return not self.images or self.rows + rows <= self._room

    def add(self, batch: FeatureBatch) -> None:
        """Copy an image to the CPU; its tensors may change afterwards."""
        pairs = batch.pairs
        moved = {k: _to_cpu(getattr(pairs, k)) for k in ("size", "boxes", "scores", "classes", "pairing")}
        own = {k: _to_cpu(getattr(batch, k)) for k in ("gt_boxes", "gt_hoi")}
        large = {k: self._buffered(k, getattr(batch, k)) for k in LARGE}
        if batch.adapter_feat.is_cuda:
            self._copied = self._copied or torch.cuda.Event(blocking=True)  # waiting must not spin
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

    def keep_valid(self) -> str | None:
        """Drop the first image with a value that cannot be and all after it. Returns the problem, or None."""
        if self._copied is not None:
            self._copied.synchronize()
        for number, batch in enumerate(self.images):
            problem = _problem(batch)
            if problem:
                del self.images[number:]
                self.rows = sum(len(kept.pairs) for kept in self.images)
                return problem
        return None

    def clear(self) -> None:
        """Make room for other images."""
        self.images, self.rows = [], 0

    def tensors(self) -> dict[str, Tensor]:
        """Content of the shard's file."""
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
        """One index entry for each image."""
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
    return x.to("cpu", copy=True, non_blocking=x.is_cuda)  # from a GPU this is pinned memory


def _problem(batch: FeatureBatch) -> str | None:
    """Describe the first tensor of an image that no reader would take, or return None."""
    tensors = {
        "adapter_feat": batch.adapter_feat, "logits": batch.logits, "boxes": batch.pairs.boxes, "scores": batch.pairs.scores,
        "gt_boxes": batch.gt_boxes,
    }  # fmt: skip
    for name, x in tensors.items():
        problem = range_problem(name, x, SHARD[name], {}) or (box_problem(name, x) if "boxes" in name else None)
        if problem:
            return f"image {batch.image}: {problem}: check its annotation, and whether EZ-HOI scores it without plugins"
    return None

"""Small feature stores, written by hand."""

from __future__ import annotations

import torch

from ezhoi_diffusion.features.batch import FeatureBatch, Pairs
from ezhoi_diffusion.features.writer import FeatureWriter, finish_store, write_ezhoi_tensors

D, CLASSES = 16, 5


META = {"split": "train", "fingerprint": {"dim": D}}


def image(index, pairs):
    generator = torch.Generator().manual_seed(index)
    boxes = torch.rand(pairs + 1, 4, generator=generator).cumsum(1)
    pairing = torch.stack([torch.zeros(pairs, dtype=torch.long), torch.arange(1, pairs + 1)])
    return FeatureBatch(
        index=index,
        pairs=Pairs(f"{index}.jpg", 0, torch.tensor([224, 224]), boxes, boxes[:, 0], torch.arange(pairs + 1), pairing),
        adapter_feat=torch.randn(pairs, D, generator=generator),
        text=None,
        logits=torch.randn(pairs, CLASSES, generator=generator),
        labels=torch.rand(pairs, CLASSES, generator=generator) > 0.5,
        gt_boxes=torch.rand(2, 3, 4, generator=generator).cumsum(2),
        gt_hoi=torch.tensor([1, 2, 3]),
    )


IMAGES = [image(i, pairs) for i, pairs in enumerate([3, 0, 5, 2, 0, 4])]


def write(folder, images=IMAGES, **kwargs):
    writer = FeatureWriter(folder, META, **kwargs)
    for batch in images:
        writer.add(batch)
    writer.flush()
    write_ezhoi_tensors(folder, {"text": torch.randn(7, D), "context/ctx.0": torch.ones(2)})
    return finish_store(folder)

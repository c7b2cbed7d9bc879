"""Random detections."""

from __future__ import annotations

import torch

from ezhoi_diffusion.evaluation.average_precision import (
    Scored,
)


def random_scored(seed: int, images: int, classes: int) -> tuple[Scored, torch.Tensor]:
    """Detections of distinct scores, and annotations [I, K]; with luck a class has no annotation, or no detection."""
    generator = torch.Generator().manual_seed(seed)
    often = torch.tensor([0.0, 0.1, 0.5, 1.5])[torch.randint(4, (2, classes), generator=generator)]
    annotations, false = (torch.poisson(rate.expand(images, classes), generator=generator).long() for rate in often)
    true = (annotations * torch.rand(images, classes, generator=generator)).round().long()
    cells = torch.arange(images * classes)
    cell = torch.cat([cells.repeat_interleave(true.flatten()), cells.repeat_interleave(false.flatten())])
    labels = torch.cat([torch.ones(int(true.sum())), torch.zeros(int(false.sum()))]).double()
    order = torch.randperm(len(cell), generator=generator)
    scores = torch.randperm(len(cell), generator=generator).double() + labels * len(cell) / 3 + 0.1 * labels
    return Scored(scores[order], cell[order] % classes, labels[order], cell[order] // classes), annotations

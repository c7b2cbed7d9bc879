"""How the two boxes of a pair lie to each other. No class is needed for it, so what it teaches holds for unseen classes too."""

from __future__ import annotations

import torch
from torch import Tensor

from ezhoi_diffusion.features.batch import Pairs

GEOMETRY = (
    "gap between the boxes",
    "distance of the centres",
    "offset of the object downwards",
    "log ratio of the areas",
    "overlap",
    "share of the object inside the human",
)


def pair_geometry(pairs: Pairs) -> Tensor:
    """The columns of `GEOMETRY`, [P, G] float64. The unit of length is the fourth root of the product of the areas."""
    human, other = (pairs.boxes[index].double() for index in pairs.pairing)
    area_h, area_o = ((box[:, 2:] - box[:, :2]).clamp_min(1e-3).prod(1) for box in (human, other))
    unit = (area_h * area_o).pow(0.25).unsqueeze(1)
    offset = (other[:, :2] + other[:, 2:] - human[:, :2] - human[:, 2:]) / 2 / unit
    apart = torch.maximum(human[:, :2], other[:, :2]) - torch.minimum(human[:, 2:], other[:, 2:])
    shared = (-apart).clamp_min(0).prod(1)
    return torch.stack(
        [
            (apart.clamp_min(0) / unit).norm(dim=1),
            offset.norm(dim=1),
            offset[:, 1],
            (area_h / area_o).log(),
            shared / (area_h + area_o - shared),
            shared / area_o,
        ],
        dim=1,
    )

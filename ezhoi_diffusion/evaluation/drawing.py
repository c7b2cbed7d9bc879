"""Draw a few images of a capture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def draw_images(images: Sequence[Mapping[str, Any]], count: int, seed: int) -> set[int]:
    """Positions of `count` images that have pairs, or of all that have some, drawn by `seed`."""
    usable = [position for position, image in enumerate(images) if image["rows"]]
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))
    return {usable[index] for index in order[:count].tolist()}

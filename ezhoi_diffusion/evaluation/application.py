"""Bridges applied to the features of some images."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.variants import Variant
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.inputs import read_only

TIMED_SECONDS = 1.0  # of images that are timed one at a time, or fewer images, if they take this long


@torch.no_grad()
def bridged(
    variants: Mapping[str, Variant], features: Tensor, images: Sequence[Pairs], timed: int, device: torch.device | str
) -> dict[str, tuple[Tensor | None, list[float]]]:
    """Apply each variant to the features [P, D] of some images.

    Args:
        variants: Bridges by name. One that takes many images gets all features at once.
        features: On the CPU.
        images: The pairs of each image.
        timed: Number of images that are timed alone. A bridge that takes many images gets them a second time.
        device: Where the bridges get their features.

    Returns:
        Name -> features [P, D] on the CPU, None if nothing changes, and the seconds that single images took.

    Raises:
        EzhoiDiffusionError: A bridge returns something else for an image alone.
        InputWrittenError: A bridge writes into what it gets.
    """
    given = features.to(device)
    found: dict[str, tuple[Tensor | None, list[float]]] = {}
    for name, variant in variants.items() if len(features) else ():
        gets_pairs = timed > 0 or not variant.takes_many_images
        # around all calls, because a bridge may keep what one gave it and write in the next
        with read_only(f"bridge '{name}'", adapter_feat=given, pairs=[*images] if gets_pairs else []):
            found[name] = _at_once_or_singly(name, variant, given, images, timed)
    return found


def _at_once_or_singly(
    name: str, variant: Variant, features: Tensor, images: Sequence[Pairs], timed: int
) -> tuple[Tensor | None, list[float]]:
    parts: list[Tensor] = list(features.split([len(pairs) for pairs in images]))
    seconds: list[float] = []
    together = variant.apply(features, None).cpu() if variant.takes_many_images else None
    single: list[Tensor | None] = []
    for pairs, part in zip(images, parts, strict=True):
        if together is not None and (len(seconds) >= timed or sum(seconds) >= TIMED_SECONDS):
            break
        alone = part.clone()  # a new tensor, so that no bridge can have cached it
        if not len(pairs):
            single.append(None)
            continue
        with read_only(f"bridge '{name}'", adapter_feat=alone):
            begin = time.perf_counter()
            single.append(variant.apply(alone, pairs).cpu())  # waits for the device
            if len(seconds) < timed:
                seconds.append(time.perf_counter() - begin)
    if together is None:
        if all(one is None for one in single):
            return None, seconds
        return torch.cat([part.cpu() if one is None else one for part, one in zip(parts, single, strict=True)]), seconds
    for pairs, one, expected in zip(images, single, together.split([len(pairs) for pairs in images]), strict=False):
        if one is not None:
            check_row_by_row(name, pairs.image, one, expected)
    return together, seconds


def check_row_by_row(name: str, image: str | None, alone: Tensor, together: Tensor) -> None:
    """Raise EzhoiDiffusionError where a bridge gives an image alone other features [P, D] than together with others."""
    if not torch.allclose(alone, together, rtol=1e-3, atol=1e-4 * float(alone.abs().max())):
        raise EzhoiDiffusionError(
            f"bridge '{name}' says row_by_row, but its result for image {image} changes if other images are in the "
            f"same call: compute each feature by itself, or set row_by_row = False"
        )

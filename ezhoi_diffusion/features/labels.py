"""Labels for fitting: annotated pairs of seen classes, in training images.

Interactions that the split hides (`classes/unseen`) are never learned from, even where their annotations were captured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.score import EzHoiScore, interaction_classes, targets_of
from ezhoi_diffusion.features.split import FRACTION, validation_mask
from ezhoi_diffusion.features.store import FeatureStore


class LabelsError(EzhoiDiffusionError):
    """The features have no labels, or labels that must not be learned from."""


@dataclass(frozen=True, eq=False)
class SeenPairs:
    """M annotated (pair, target class), on the CPU.

    Attributes:
        visual: [M, D] float32, adapter_feat as captured.
        text: [M, D] float32, the text of the target class (`EzHoiScore.class_text`).
        target: [M] int64, target class; for HICO-DET the verb.
        image: [M] int64, position of the image in the store.
    """

    visual: Tensor
    text: Tensor
    target: Tensor
    image: Tensor

    def __len__(self) -> int:
        return len(self.target)


def seen_pairs(store: FeatureStore, *, held_out: bool | None = False, fraction: float = FRACTION) -> SeenPairs:
    """Collect the annotated pairs of seen classes.

    A pair is annotated where EZ-HOI matched it by IoU. A label is dropped if its object makes it a hidden interaction. It is
    dropped too if its image has an annotation of a hidden interaction with the same verb, since the detector may have
    misnamed the object.

    Args:
        store: A capture of the train split.
        held_out: Use the held-out images (True), the others (False), or all (None).
        fraction: Share of the images that is held out.

    Raises:
        LabelsError: The store holds test images or too few images, or has no such pair.
        FeatureStoreError: The store was imported without labels.
        ScoreError: The store lacks a constant of EZ-HOI's score.
    """
    if store.split != "train":
        raise LabelsError(
            f"{store.folder} holds the {store.split} split: learn from training images only, captured with "
            f"--capture-split train"
        )
    store.require_captured("which pairs are annotated")
    score = EzHoiScore.from_store(store)
    unseen = store.ezhoi.get("classes/unseen", torch.zeros(0, dtype=torch.long))
    try:
        validation = validation_mask(len(store.images), fraction)
    except ValueError as error:
        raise LabelsError(f"{store.folder} has too few images: {error}") from error
    chosen = torch.ones_like(validation) if held_out is None else validation if held_out else ~validation
    visual, targets, images = [], [], []
    begin = 0
    for entry, shard in zip(store.index["shards"], store.shards(), strict=True):
        positions = torch.arange(begin, begin + len(entry["images"]))
        begin += len(positions)
        image, annotated_in = (
            positions.repeat_interleave(torch.tensor([one[count] for one in entry["images"]]))
            for count in ("rows", "annotations")
        )
        row, target = shard["labels"].nonzero().unbind(1)
        interaction = interaction_classes(store, shard["objects"][row], target)
        is_hidden = torch.isin(shard["gt_hoi"], unseen)
        hidden = torch.zeros(len(store.images), shard["labels"].shape[1], dtype=torch.bool)
        hidden[annotated_in[is_hidden], targets_of(store)[shard["gt_hoi"][is_hidden].long()]] = True
        kept = (interaction >= 0) & ~torch.isin(interaction, unseen) & ~hidden[image[row], target] & chosen[image[row]]
        visual.append(shard["adapter_feat"][row[kept]])
        targets.append(target[kept])
        images.append(image[row[kept]])
    target = torch.cat(targets)
    if len(target) == 0:
        raise LabelsError(
            f"{store.folder}: no pair of a seen class is annotated in the images to learn from: capture more images"
        )
    return SeenPairs(torch.cat(visual), score.class_text[target], target, torch.cat(images))

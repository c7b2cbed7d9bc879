"""What may be learned from labels: annotated pairs of seen classes in training images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.score import EzHoiScore, interaction_classes, targets_of
from ezhoi_diffusion.features.split import FRACTION, validation_mask
from ezhoi_diffusion.features.store import FeatureStore


class LabelsError(EzhoiDiffusionError):
    """Features that have no labels to learn from, or whose labels must not be learned from."""


@dataclass(frozen=True, eq=False)
class SeenPairs:
    """M rows, one for each annotated (pair, target class).

    visual: [M, D] adapter_feat as captured. text: [M, D] the text of the row's class, as the host's score multiplies with
    it (`EzHoiScore.class_text`). target: [M] int64 target class, in HICO-DET the verb. image: [M] int64 position of its image
    in the store. All float32, on the CPU.
    """

    visual: Tensor
    text: Tensor
    target: Tensor
    image: Tensor

    def __len__(self) -> int:
        return len(self.target)


def seen_pairs(store: FeatureStore, *, held_out: bool | None = False, fraction: float = FRACTION) -> SeenPairs:
    """Annotated pairs of seen classes in the training images, or in those that are held out; None: in all.

    A pair counts as annotated where the host matched it by IoU. Of interactions that the split hides (`classes/unseen`)
    nothing is learned, even where their annotations were captured: a label is dropped if its object makes it one of them, or
    if its image has an annotation of one with the same verb, which a misnamed object may hide. Raises LabelsError for a store of test images, without
    labels or without such pairs, and ScoreError where the host's score is not known.
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
        apart = validation_mask(len(store.images), fraction)
    except ValueError as error:
        raise LabelsError(f"{store.folder} has too few images: {error}") from error
    wanted = torch.ones_like(apart) if held_out is None else apart if held_out else ~apart
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
        secret = torch.isin(shard["gt_hoi"], unseen)
        hidden = torch.zeros(len(store.images), shard["labels"].shape[1], dtype=torch.bool)
        hidden[annotated_in[secret], targets_of(store)[shard["gt_hoi"][secret].long()]] = True
        kept = (interaction >= 0) & ~torch.isin(interaction, unseen) & ~hidden[image[row], target] & wanted[image[row]]
        visual.append(shard["adapter_feat"][row[kept]])
        targets.append(target[kept])
        images.append(image[row[kept]])
    target = torch.cat(targets)
    if len(target) == 0:
        raise LabelsError(
            f"{store.folder}: no pair of a seen class is annotated in the images to learn from: capture more images"
        )
    return SeenPairs(torch.cat(visual), score.class_text[target], target, torch.cat(images))

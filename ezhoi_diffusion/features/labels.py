"""Labels for fitting: annotated pairs of seen classes, and what EZ-HOI's training loss asks of every pair.

Interactions that the split hides (`classes/unseen`) are never learned from, even where their annotations were captured. Nor are
their texts, where EZ-HOI ran with --without_unseen_name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

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
        text: [M, D] float32, the text of the target class (`EzHoiScore.class_text`, of texts that may be learned from).
        target: [M] int64, target class; for HICO-DET the verb.
        image: [M] int64, position of the image in the store.
    """

    visual: Tensor
    text: Tensor
    target: Tensor
    image: Tensor

    def __len__(self) -> int:
        return len(self.target)


@dataclass(frozen=True, eq=False)
class LabelledPairs:
    """N pairs with or without an annotation, and what may be learned from each (pair, target class), on the CPU.

    Attributes:
        visual: [N, D] float32, adapter_feat as captured.
        target: [N, C] bool, whether the class is annotated. It is False where `valid` is.
        valid: [N, C] bool, whether the class counts: the pair can have it, and no hidden annotation may be meant.
        prior: [N] float32, the detector's scores of human and object, multiplied.
        image: [N] int64, position of the image in the store.
        class_weight: [C, D] float32, the vectors whose product with a feature is EZ-HOI's logit.
    """

    visual: Tensor
    target: Tensor
    valid: Tensor
    prior: Tensor
    image: Tensor
    class_weight: Tensor

    def __len__(self) -> int:
        return len(self.visual)

    def __getitem__(self, indices: Tensor) -> LabelledPairs:
        """The pairs at these positions, on their device."""
        return self._each(lambda x: x[indices])

    def to(self, device: torch.device | str) -> LabelledPairs:
        """The same pairs on a device."""
        return replace(self._each(lambda x: x.to(device)), class_weight=self.class_weight.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> LabelledPairs:
        """Change every tensor that has a row for each pair."""
        rows = {name: change(getattr(self, name)) for name in ("visual", "target", "valid", "prior", "image")}
        return replace(self, **rows)


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
    score = _require_labels(store)
    chosen = _chosen_images(store, held_out, fraction)
    visual, targets, images = [], [], []
    for _, shard, image, valid in _valid_labels(store, score):
        row, target = (shard["labels"] & valid & chosen[image].unsqueeze(1)).nonzero().unbind(1)
        visual.append(shard["adapter_feat"][row])
        targets.append(target)
        images.append(image[row])
    target = _joined(targets)
    _require_some(store, len(target))
    class_text = score.of_texts(store.learnable_texts()).class_text
    return SeenPairs(_joined(visual), class_text[target], target, _joined(images))


def labelled_pairs(store: FeatureStore) -> LabelledPairs:
    """Collect all pairs, background included, with the labels that EZ-HOI's training loss uses.

    The loss counts a target class of a pair where the object has such an interaction and the split does not hide it. As in
    `seen_pairs`, a verb does not count in an image that has an annotation of a hidden interaction with that verb.

    Raises:
        LabelsError: The store holds test images, or has no annotated pair of a seen class.
        FeatureStoreError: The store was imported without labels.
        ScoreError: The store lacks a constant of EZ-HOI's score.
    """
    score = _require_labels(store)
    parts: dict[str, list[Tensor]] = {name: [] for name in ("visual", "target", "valid", "prior", "image")}
    for entry, shard, image, known in _valid_labels(store, score):
        prior = pair_priors(entry, shard)
        valid = known & (prior > 0).unsqueeze(1)
        columns = (shard["adapter_feat"], shard["labels"] & valid, valid, prior, image)
        for part, column in zip(parts.values(), columns, strict=True):
            part.append(column)
    found = {name: _joined(part) for name, part in parts.items()}
    _require_some(store, int(found["target"].sum()))
    class_text = score.of_texts(store.learnable_texts()).class_text
    return LabelledPairs(**found, class_weight=class_text * score.logit_scale / 2)


def seen_targets(store: FeatureStore, score: EzHoiScore) -> Tensor:
    """[O, C] bool, the target classes of each object whose interactions the split does not hide."""
    seen = score.object_to_target.clone()
    objects, targets = seen.nonzero().unbind(1)
    interaction = interaction_classes(store, objects, targets)
    seen[objects, targets] = (interaction >= 0) & ~torch.isin(interaction, _unseen(store))
    return seen


def _unseen(store: FeatureStore) -> Tensor:
    """[k] int64, the interaction classes that the split hides; empty where it hides none."""
    return store.ezhoi.get("classes/unseen", torch.zeros(0, dtype=torch.long))


def _require_labels(store: FeatureStore) -> EzHoiScore:
    """The constants of the score. Raises what `seen_pairs` raises of a store without labels to learn from."""
    if store.split != "train":
        raise LabelsError(
            f"{store.folder} holds the {store.split} split: learn from training images only, captured with "
            f"--capture-split train"
        )
    store.require_captured("which pairs are annotated")
    return EzHoiScore.from_store(store)


def _require_some(store: FeatureStore, count: int) -> None:
    if count == 0:
        raise LabelsError(
            f"{store.folder}: no pair of a seen class is annotated in the images to learn from: capture more images"
        )


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts as one tensor; each is let go once it is copied, so that they are not in memory twice."""
    found = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    end = len(found)
    while parts:
        part = parts.pop()
        found[end - len(part) : end] = part
        end -= len(part)
    return found


def _chosen_images(store: FeatureStore, held_out: bool | None, fraction: float) -> Tensor:
    """[I] bool. Raises LabelsError for too few images."""
    try:
        validation = validation_mask(len(store.images), fraction)
    except ValueError as error:
        raise LabelsError(f"{store.folder} has too few images: {error}") from error
    return torch.ones_like(validation) if held_out is None else validation if held_out else ~validation


def _valid_labels(
    store: FeatureStore, score: EzHoiScore
) -> Iterator[tuple[dict[str, Any], dict[str, Tensor], Tensor, Tensor]]:
    """Yield each shard: its entry in the index, its tensors, the image of each pair [n], and the labels that count [n, C]."""
    unseen, seen = _unseen(store), seen_targets(store, score)
    target_of, begin = targets_of(store), 0
    for entry, shard in zip(store.index["shards"], store.shards(), strict=True):
        positions = torch.arange(len(entry["images"]))
        image, annotated_in = (
            positions.repeat_interleave(torch.tensor([one[count] for one in entry["images"]]))
            for count in ("rows", "annotations")
        )
        is_hidden = torch.isin(shard["gt_hoi"], unseen)
        hidden = torch.zeros(len(positions), seen.shape[1], dtype=torch.bool)
        hidden[annotated_in[is_hidden], target_of[shard["gt_hoi"][is_hidden].long()]] = True
        yield entry, shard, begin + image, seen[shard["objects"].long()] & ~hidden[image]
        begin += len(positions)


def pair_priors(entry: dict[str, Any], shard: dict[str, Tensor]) -> Tensor:
    """[n], the detector's scores of human and object, multiplied: the prior of EZ-HOI's training, whose exponent is 1."""
    boxes, rows = (torch.tensor([one[count] for one in entry["images"]]) for count in ("boxes", "rows"))
    first_box = (boxes.cumsum(0) - boxes).repeat_interleave(rows)
    return shard["scores"][shard["pairing"].long() + first_box.unsqueeze(1)].prod(1)

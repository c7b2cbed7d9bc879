"""Labels for fitting: annotated pairs of seen classes, and what EZ-HOI's training loss asks of every pair.

Interactions that the split hides (`classes/unseen`) are never learned from, even where their annotations were captured. Nor are
their texts, where EZ-HOI ran with --without_unseen_name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.images import image_of, shard_pairs
from ezhoi_diffusion.features.rows import StoredRows
from ezhoi_diffusion.features.score import EzHoiScore, interaction_classes, targets_of
from ezhoi_diffusion.features.split import FRACTION, validation_mask
from ezhoi_diffusion.features.store import FeatureStore

BLOCK = 65536  # pairs whose labels are unpacked together


class LabelsError(EzhoiDiffusionError):
    """The features have no labels, or labels that must not be learned from."""


@dataclass(frozen=True, eq=False)
class SeenPairs:
    """M annotated (pair, target class), on the CPU.

    Attributes:
        visual: [M, D] float32, adapter_feat as captured.
        target: [M] int64, target class; for HICO-DET the verb.
        image: [M] int64, position of the image in the store.
        class_text: [C, D] float32, the text of each target class (`EzHoiScore.class_text`, of texts that may be learned from).
    """

    visual: Tensor
    target: Tensor
    image: Tensor
    class_text: Tensor

    def __len__(self) -> int:
        return len(self.target)

    @property
    def text(self) -> Tensor:
        """[M, D] float32, the text of each target class: as large as `visual`, and made at every access."""
        return self.class_text[self.target]


class SeenLabels(NamedTuple):
    """M annotated (pair, target class), on the CPU, without features.

    Attributes:
        pair: [M] int64, position of the pair in the store.
        target: [M] int64, target class.
        image: [M] int64, position of the image in the store.
        class_text: [C, D] float32, the text of each target class.
    """

    pair: Tensor
    target: Tensor
    image: Tensor
    class_text: Tensor


@dataclass(frozen=True, eq=False)
class PairLabels:
    """What may be learned from each (pair, target class) of N pairs with or without an annotation, on the CPU.

    Attributes:
        target: [N, C] bool, whether the class is annotated. It is False where `valid` is.
        valid: [N, C] bool, whether the class counts: the pair can have it, and no hidden annotation may be meant.
        prior: [N] float32, the detector's scores of human and object, multiplied.
        image: [N] int64, position of the image in the store.
        class_weight: [C, D] float32, the vectors whose product with a feature is EZ-HOI's logit.
    """

    target: Tensor
    valid: Tensor
    prior: Tensor
    image: Tensor
    class_weight: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def to(self, device: torch.device | str) -> PairLabels:
        """The same labels on a device."""
        return PairLabels(
            self.target.to(device),
            self.valid.to(device),
            self.prior.to(device),
            self.image.to(device),
            self.class_weight.to(device),
        )


@dataclass(frozen=True, eq=False)
class PackedLabels:
    """`PairLabels` of all N pairs of a store, eight classes to a byte: of HICO-DET's training images 38 MB, and not 221.

    Attributes:
        target: [N, ceil(C / 8)] uint8.
        valid: [N, ceil(C / 8)] uint8.
        prior: [N] float32.
        image: [N] int64.
        class_weight: [C, D] float32.
    """

    target: Tensor
    valid: Tensor
    prior: Tensor
    image: Tensor
    class_weight: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, indices: Tensor | slice) -> PairLabels:
        """The labels of the pairs at these positions [n]."""
        target, valid = (self._unpacked(bits[indices]) for bits in (self.target, self.valid))
        return PairLabels(target, valid, self.prior[indices], self.image[indices], self.class_weight)

    def positives(self, indices: Tensor | slice) -> int:
        """How many classes the pairs at these positions [n] are annotated with, together."""
        return sum(int(self._unpacked(bits).count_nonzero()) for bits in self.target[indices].split(BLOCK))

    def _unpacked(self, bits: Tensor) -> Tensor:
        return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=len(self.class_weight)).view(np.bool_))


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
    found = seen_labels(store, held_out=held_out, fraction=fraction)
    return SeenPairs(StoredRows(store)[found.pair], found.target, found.image, found.class_text)


def seen_labels(store: FeatureStore, *, held_out: bool | None = False, fraction: float = FRACTION) -> SeenLabels:
    """What `seen_pairs` collects, without the features. Takes and raises the same."""
    score = _require_labels(store)
    chosen = _chosen_images(store, held_out, fraction)
    parts, begin = [], 0
    for _, shard, image, valid in _valid_labels(store, score):
        row, target = (shard["labels"] & valid & chosen[image].unsqueeze(1)).nonzero().unbind(1)
        parts.append((begin + row, target, image[row]))
        begin += len(image)
    pair, target, image = (torch.cat(part) for part in zip(*parts, strict=True))
    _require_some(store, len(target))
    return SeenLabels(pair, target, image, score.of_texts(store.learnable_texts()).class_text)


def pair_labels(store: FeatureStore) -> PackedLabels:
    """Collect the labels of all pairs. Raises what `labelled_shards` raises."""
    room: tuple[Tensor, ...] = ()
    begin, class_weight = 0, None
    for _, _, labels in labelled_shards(store):
        bits = (torch.from_numpy(np.packbits(x.numpy(), axis=1)) for x in (labels.target, labels.valid))
        parts, class_weight = (*bits, labels.prior, labels.image), labels.class_weight
        room = room or tuple(x.new_empty(len(store), *x.shape[1:]) for x in parts)  # for all, as in FeatureStore.rows
        for whole, part in zip(room, parts, strict=True):
            whole[begin : begin + len(labels)] = part
        begin += len(labels)
    assert class_weight is not None
    target, valid, prior, image = room
    return PackedLabels(target, valid, prior, image, class_weight)


def labelled_shards(store: FeatureStore) -> Iterator[tuple[dict[str, Any], dict[str, Tensor], PairLabels]]:
    """Yield each shard, background included, with the labels that EZ-HOI's training loss uses.

    The loss counts a target class of a pair where the object has such an interaction and the split does not hide it. As in
    `seen_pairs`, a verb does not count in an image that has an annotation of a hidden interaction with that verb.

    Yields:
        The shard's entry in the index, its tensors, and the labels of its pairs.

    Raises:
        LabelsError: The store holds test images, or at the end, no pair of a seen class was annotated.
        FeatureStoreError: The store was imported without labels.
        ScoreError: The store lacks a constant of EZ-HOI's score.
    """
    score = _require_labels(store)
    class_weight = score.of_texts(store.learnable_texts()).class_text * score.logit_scale / 2
    count = 0
    for entry, shard, image, known in _valid_labels(store, score):
        prior = pair_priors(entry, shard)
        valid = known & (prior > 0).unsqueeze(1)
        target = shard["labels"] & valid
        count += int(target.count_nonzero())
        yield entry, shard, PairLabels(target, valid, prior, image, class_weight)
    _require_some(store, count)


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
        image, annotated_in = image_of(entry, "rows"), image_of(entry, "annotations")
        is_hidden = torch.isin(shard["gt_hoi"], unseen)
        hidden = torch.zeros(len(entry["images"]), seen.shape[1], dtype=torch.bool)
        hidden[annotated_in[is_hidden], target_of[shard["gt_hoi"][is_hidden].long()]] = True
        yield entry, shard, begin + image, seen[shard["objects"].long()] & ~hidden[image]
        begin += len(entry["images"])


def pair_priors(entry: dict[str, Any], shard: dict[str, Tensor]) -> Tensor:
    """[n], the detector's scores of human and object, multiplied: the prior of EZ-HOI's training, whose exponent is 1."""
    pairs = shard_pairs(entry, shard)
    return pairs.scores[pairs.pairing].prod(0)

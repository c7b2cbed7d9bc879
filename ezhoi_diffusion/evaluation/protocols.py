"""The detections that EZ-HOI forms from stored images, and how a data set evaluates those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ezhoi_diffusion.evaluation.average_precision import MIN_IOU, Algorithm, overlap
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.features.images import StoredImage
from ezhoi_diffusion.features.score import EzHoiScore, ScoreError, interaction_classes, names_of_interactions
from ezhoi_diffusion.features.store import FeatureStore

Setting = Literal["default", "known-object"]
GROUPS = ("full", "unseen", "seen", "rare", "non-rare")  # a file of tensors keeps no order


MatchFn = Callable[[StoredImage], tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class Detections:
    """The M scored (pair, verb) combinations of some images, the same for every bridge.

    Pairs are numbered over all the images.

    Attributes:
        row: The pair [M].
        target: The verb [M].
        classes: The interaction class [M].
        prior: Product of the detector scores, as EZ-HOI weighs it, [M].
        image: Position among the images [M].
        candidate: Detections [K] that overlap an annotation of their class enough.
        annotation: The annotation [K] that each candidate belongs to.
    """

    row: Tensor
    target: Tensor
    classes: Tensor
    prior: Tensor
    image: Tensor
    candidate: Tensor
    annotation: Tensor

    @classmethod
    def from_images(cls, images: Sequence[StoredImage], match: MatchFn) -> Detections:
        """The detections of all images, as `EvalProtocol.match` gives them for each."""
        columns: list[tuple[Tensor, ...]] = []
        num_pairs = found = annotations = 0
        for position, image in enumerate(images):
            row, target, classes, prior, candidate, annotation = match(image)
            columns.append(
                (
                    row + num_pairs, target, classes, prior, torch.full_like(row, position), candidate + found,
                    annotation + annotations,
                )
            )  # fmt: skip
            num_pairs, found = num_pairs + len(image.pairs), found + len(row)
            annotations += int(annotation.max()) + 1 if len(annotation) else 0
        return cls(*(torch.cat(column) for column in zip(*columns, strict=True)))

    def scores(self, logits: Tensor) -> Tensor:
        """Scores [M] from the logits [P, C] of all pairs."""
        return logits[self.row, self.target].sigmoid() * self.prior

    def labels(self, scores: Tensor) -> Tensor:
        """Labels [M] bool, True for a true positive: the best scored candidate of each annotation."""
        labels = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        if len(self.candidate):
            order = scores[self.candidate].argsort(descending=True, stable=True)
            order = order[self.annotation[order].argsort(stable=True)]
            belongs = self.annotation[order]
            first = torch.cat([belongs.new_ones(1, dtype=torch.bool), belongs[1:] != belongs[:-1]])
            labels[self.candidate[order[first]]] = True
        return labels


@dataclass(frozen=True, eq=False)
class EvalProtocol:
    """How a data set evaluates a stored image, in K classes.

    Attributes:
        match: Image -> its M detections and candidates: the columns of `Detections` without `image`.
        count: Image -> annotations of each class, [K] int64.
        groups: As in `Comparison`.
        names: As in `Comparison`.
        uncaptured: Annotations of the split's images that EZ-HOI leaves out, [I, K] int64. They count as missed.
        algorithm: Of average precision.
        setting: `known-object` scores a class only on images that have its object (Chao et al., WACV 2018).
        partial: Some annotations are left out. Classes that have none left are left out of the groups.
    """

    match: MatchFn
    count: Callable[[StoredImage], Tensor]
    groups: dict[str, Tensor]
    names: list[str] | None
    uncaptured: Tensor
    algorithm: Algorithm = "11P"
    setting: Setting = "default"
    partial: bool = False


def hicodet(
    store: FeatureStore, *, algorithm: Algorithm = "11P", setting: Setting = "default", classes: Tensor | None = None
) -> EvalProtocol:
    """HICO-DET's protocol, as EZ-HOI evaluates it.

    Args:
        store: The capture.
        algorithm: Of average precision.
        setting: One of those of `EvalProtocol`.
        classes: Interaction classes whose annotations may be used [k]; all by default.

    Raises:
        ScoreError: The capture is of another data set, or lacks a constant of EZ-HOI's score.
    """
    dataset = store.fingerprint.get("dataset")
    if dataset != "hicodet":
        own = (
            f": for V-COCO give its annotations, `ezhoi-diffusion compare {store.folder} --vcoco DIR`"
            if dataset == "vcoco"
            else ""
        )
        raise ScoreError(f"{store.folder} is a capture of {dataset}, which EZ-HOI cannot evaluate{own}")
    score = EzHoiScore.from_store(store)
    num_classes = int(store.ezhoi["object_n_verb_to_interaction"].max()) + 1

    def usable(image: StoredImage) -> StoredImage:
        if classes is None:
            return image
        kept = torch.isin(image.gt_hoi, classes)
        return replace(image, gt_boxes=image.gt_boxes[kept], gt_hoi=image.gt_hoi[kept])

    return EvalProtocol(
        match=lambda image: _detections(store, score, usable(image)),
        count=lambda image: torch.bincount(usable(image).gt_hoi, minlength=num_classes),
        groups={name: store.ezhoi[f"classes/{name}"] for name in GROUPS if f"classes/{name}" in store.ezhoi},
        names=names_of_interactions(store),
        uncaptured=torch.zeros(0, num_classes, dtype=torch.long),
        algorithm=algorithm,
        setting=setting,
        partial=classes is not None,
    )


def scored_pairs(score: EzHoiScore, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """The M (pair, target class) combinations that EZ-HOI's postprocessing scores: row [M], target [M], prior [M]."""
    human, other = pairs.scores[pairs.pairing]
    prior = score.prior(human, other, pairs.objects)
    row, target = prior.nonzero().unbind(1)
    return row, target, prior[row, target]


def _detections(store: FeatureStore, score: EzHoiScore, image: StoredImage) -> tuple[Tensor, ...]:
    pairs = image.pairs
    row, target, prior = scored_pairs(score, pairs)
    classes = interaction_classes(store, pairs.objects[row], target)
    humans, others = pairs.boxes[pairs.pairing]
    if len(image.gt_hoi) == 0:
        return row, target, classes, prior, row.new_zeros(0), row.new_zeros(0)
    # `matches` for all classes at once: only annotations of a detection's own class count
    iou = overlap((image.gt_boxes[:, 0], image.gt_boxes[:, 1]), (humans, others))[:, row]
    best, belongs = iou.masked_fill(image.gt_hoi.unsqueeze(1) != classes, -1).max(0)
    candidate = (best > MIN_IOU).nonzero().squeeze(1)
    return row, target, classes, prior, candidate, belongs[candidate]


def annotated_objects(store: FeatureStore, annotations: Tensor) -> tuple[Tensor, Tensor]:
    """The object classes that each image has annotations of, [I, O] bool, and the object of every class, [K] int64."""
    table = store.ezhoi["object_n_verb_to_interaction"]
    objects, verbs = (table >= 0).nonzero().unbind(1)
    object_of = torch.zeros(annotations.shape[1], dtype=torch.long)
    object_of[table[objects, verbs]] = objects
    present = torch.zeros(len(annotations), len(table), dtype=torch.bool)
    image, annotated = annotations.nonzero().unbind(1)
    present[image, object_of[annotated]] = True
    return present, object_of

"""Stored images, the detections that the host forms of them, and how a data set's evaluation counts those."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ezhoi_diffusion.evaluation.average_precision import matches
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.features.score import EzHoiScore, ScoreError, interaction_classes, names_of_interactions
from ezhoi_diffusion.features.store import FeatureStore

GROUPS = ("full", "unseen", "seen", "rare", "non-rare")  # a file of tensors keeps no order


@dataclass(frozen=True, eq=False)
class StoredImage:
    """One image of a store: what the host gave for it, and its annotations."""

    name: str | None
    adapter_feat: Tensor  # [P, D]
    logits: Tensor  # [P, C] the host's own
    pairs: Pairs
    labels: Tensor  # [P, C] bool
    gt_boxes: Tensor  # [G, 2, 4]
    gt_hoi: Tensor  # [G]


MatchFn = Callable[[StoredImage], tuple[Tensor, ...]]


def stored_images(store: FeatureStore, chosen: set[int] | None = None) -> Iterator[StoredImage]:
    """The images of a store in order, or those at `chosen` positions. Raises FeatureStoreError for a damaged shard."""
    position = 0
    for shard, tensors in zip(store.index["shards"], store.shards(), strict=True):
        at = {"rows": 0, "boxes": 0, "annotations": 0}
        for number, image in enumerate(shard["images"]):
            span = {what: slice(begin, begin + image[what]) for what, begin in at.items()}
            at = {what: piece.stop for what, piece in span.items()}
            if chosen is None or position in chosen:
                rows, boxes, annotations = span["rows"], span["boxes"], span["annotations"]
                pairs = Pairs(
                    image["name"], 0, tensors["sizes"][number], tensors["boxes"][boxes], tensors["scores"][boxes],
                    tensors["classes"][boxes].long(), tensors["pairing"][rows].long().T,
                )  # fmt: skip
                yield StoredImage(
                    image["name"], tensors["adapter_feat"][rows], tensors["logits"][rows], pairs, tensors["labels"][rows],
                    tensors["gt_boxes"][annotations], tensors["gt_hoi"][annotations].long(),
                )  # fmt: skip
            position += 1


@dataclass(frozen=True, eq=False)
class Detections:
    """The M scored (pair, verb) combinations of some images, the same for every bridge, and their candidates for truth.

    Rows are those of all the images, one after the other.
    """

    row: Tensor  # [M] pair
    target: Tensor  # [M] verb
    classes: Tensor  # [M] interaction class
    prior: Tensor  # [M]
    image: Tensor  # [M] position among the images
    candidate: Tensor  # [K] detections that overlap an annotation of their class enough …
    annotation: Tensor  # [K] … and the annotation that each belongs to

    @classmethod
    def of(cls, images: Sequence[StoredImage], find: MatchFn) -> Detections:
        """Those that an evaluation finds in each image."""
        columns: list[tuple[Tensor, ...]] = []
        rows = found = annotations = 0
        for position, image in enumerate(images):
            row, target, classes, prior, candidate, annotation = find(image)
            columns.append(
                (
                    row + rows, target, classes, prior, torch.full_like(row, position), candidate + found,
                    annotation + annotations,
                )
            )  # fmt: skip
            rows, found = rows + len(image.pairs), found + len(row)
            annotations += int(annotation.max()) + 1 if len(annotation) else 0
        return cls(*(torch.cat(column) for column in zip(*columns, strict=True)))

    def scores(self, logits: Tensor) -> Tensor:
        """[M] of logits [P, C] of all rows."""
        return logits[self.row, self.target].sigmoid() * self.prior

    def labels(self, scores: Tensor) -> Tensor:
        """[M] of 0 and 1: of the candidates of one annotation the best scored is the true positive."""
        labels = torch.zeros_like(scores)
        if len(self.candidate):
            order = scores[self.candidate].argsort(descending=True, stable=True)
            order = order[self.annotation[order].argsort(stable=True)]
            belongs = self.annotation[order]
            first = torch.cat([belongs.new_ones(1, dtype=torch.bool), belongs[1:] != belongs[:-1]])
            labels[self.candidate[order[first]]] = 1
        return labels


@dataclass(frozen=True, eq=False)
class EvalProtocol:
    """What a data set's own evaluation makes of a stored image, in K classes.

    find: image -> its M detections and candidates, as the columns of `Detections` but `image`. count: image -> [K] int64
    annotations of each class. groups, names: as in `Comparison`. elsewhere: [I, K] int64 annotations of images of the split
    that the host leaves out.
    """

    find: MatchFn
    count: Callable[[StoredImage], Tensor]
    groups: dict[str, Tensor]
    names: list[str] | None
    elsewhere: Tensor


def hicodet(store: FeatureStore, score: EzHoiScore) -> EvalProtocol:
    """HICO-DET's, as the host has it. Raises ScoreError for a capture of another data set."""
    dataset = store.fingerprint.get("dataset")
    if dataset != "hicodet":
        own = (
            f"; V-COCO has its own: `ezhoi-diffusion compare {store.folder} --vcoco DIR`" if dataset == "vcoco" else ""
        )
        raise ScoreError(
            f"{store.folder} is a capture of {dataset}, for which the host has no evaluation to compare by{own}"
        )
    classes = int(store.ezhoi["object_n_verb_to_interaction"].max()) + 1
    return EvalProtocol(
        find=functools.partial(_detections, store, score),
        count=lambda image: torch.bincount(image.gt_hoi, minlength=classes),
        groups={name: store.ezhoi[f"classes/{name}"] for name in GROUPS if f"classes/{name}" in store.ezhoi},
        names=names_of_interactions(store),
        elsewhere=torch.zeros(0, classes, dtype=torch.long),
    )


def scored_pairs(score: EzHoiScore, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """The M (pair, target class) combinations that the host's postprocessing scores: row [M], target [M], prior [M]."""
    human, other = pairs.scores[pairs.pairing]
    prior = score.prior(human, other, pairs.objects)
    row, target = prior.nonzero().unbind(1)
    return row, target, prior[row, target]


def _detections(store: FeatureStore, score: EzHoiScore, image: StoredImage) -> tuple[Tensor, ...]:
    pairs = image.pairs
    row, target, prior = scored_pairs(score, pairs)
    classes = interaction_classes(store, pairs.objects[row], target)
    humans, others = pairs.boxes[pairs.pairing]
    candidate, annotation = [row.new_zeros(0)], [row.new_zeros(0)]
    for hoi in image.gt_hoi.unique():
        found, annotated = (classes == hoi).nonzero().squeeze(1), (image.gt_hoi == hoi).nonzero().squeeze(1)
        gt = image.gt_boxes[annotated]
        belongs, enough = matches((gt[:, 0], gt[:, 1]), (humans[row[found]], others[row[found]]))
        candidate.append(found[enough])
        annotation.append(annotated[belongs[enough]])
    return row, target, classes, prior, torch.cat(candidate), torch.cat(annotation)


def annotated_objects(store: FeatureStore, annotations: Tensor) -> tuple[Tensor, Tensor]:
    """Which object classes each image has annotations of, [I, O] bool, and the object of every class, [K] int64."""
    table = store.ezhoi["object_n_verb_to_interaction"]
    objects, verbs = (table >= 0).nonzero().unbind(1)
    object_of = torch.zeros(annotations.shape[1], dtype=torch.long)
    object_of[table[objects, verbs]] = objects
    present = torch.zeros(len(annotations), len(table), dtype=torch.bool)
    image, annotated = annotations.nonzero().unbind(1)
    present[image, object_of[annotated]] = True
    return present, object_of

"""Average precision of detected pairs, as in HICO-DET's protocol and EZ-HOI's evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Algorithm = Literal["11P", "AUC", "VOC"]
RECALLS = torch.linspace(0, 1, 11, dtype=torch.float64)  # where "11P" reads the curve


@dataclass(frozen=True, eq=False)
class Scored:
    """All M scored detections of one variant over I images and K interaction classes.

    Attributes:
        scores: [M] float64.
        classes: [M] int64.
        labels: [M] float64, 1 for a true positive.
        image: Position of the image, [M] int64.
    """

    scores: Tensor
    classes: Tensor
    labels: Tensor
    image: Tensor


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [N, M] of boxes [N, 4] and [M, 4], xyxy."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = (high - low).clamp_min(0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
    return inter / (area_a[:, None] + area_b[None] - inter)


def matches(gt: tuple[Tensor, Tensor], detected: tuple[Tensor, Tensor], min_iou: float = 0.5) -> tuple[Tensor, Tensor]:
    """Match the detections of one interaction class to its annotations (Chao et al., WACV 2018).

    A detection belongs to the annotation with which the smaller of its two IoUs is largest. It overlaps enough if that IoU
    exceeds `min_iou`.

    Args:
        gt: Annotated human and object boxes, [G, 4] each, xyxy, G at least 1.
        detected: Detected human and object boxes, [M, 4] each.
        min_iou: Threshold.

    Returns:
        The annotation of each detection [M] int64, and whether it overlaps enough [M] bool.
    """
    iou, belongs = torch.minimum(box_iou(gt[0], detected[0]), box_iou(gt[1], detected[1])).max(0)
    return belongs, iou > min_iou


def associate_pairs(
    gt: tuple[Tensor, Tensor], detected: tuple[Tensor, Tensor], scores: Tensor, min_iou: float = 0.5
) -> Tensor:
    """Label the detections of one interaction class: float [M], 1 for a true positive.

    Of the detections that `matches` assigns to one annotation, the best scored is the true positive.
    """
    labels = torch.zeros_like(scores)
    if len(gt[0]) == 0 or len(scores) == 0:
        return labels
    belongs, enough = matches(gt, detected, min_iou)
    for annotation in range(len(gt[0])):
        candidates = torch.nonzero((belongs == annotation) & enough).squeeze(1)
        if len(candidates):
            labels[candidates[scores[candidates].argmax()]] = 1
    return labels


def ranked(scored: Scored) -> Iterator[tuple[int, Tensor]]:
    """Yield every detected class with the positions of its detections [m], best scored first."""
    order = torch.argsort(scored.classes, stable=True)
    present, counts = scored.classes[order].unique_consecutive(return_counts=True)
    for index, rows in zip(present.tolist(), order.split(counts.tolist()), strict=True):
        yield index, rows[scored.scores[rows].argsort(descending=True)]


def average_precision(scored: Scored, num_gt: Sequence[int] | Tensor, algorithm: Algorithm = "11P") -> Tensor:
    """AP of each class, float64 [K] in 0..1; zero for a class without detections or annotations.

    "11P": precision interpolated at eleven recalls (Everingham et al., VOC 2007), as EZ-HOI reports it.
    "AUC": the area under the curve, as pocket's DetectionAPMeter computes it. Straight lines join the points of the curve,
    and it ends before the last true positive: of T true positives T − 1 count, so a class with one has an AP of zero.
    "VOC": the area under the curve with precision interpolated at every recall (Everingham et al., VOC 2010), as V-COCO's
    tool computes it.

    The bootstrap has the same areas for images with weights (`bootstrap.py`). They agree to rounding.

    Args:
        scored: The detections.
        num_gt: Annotated pairs of each of the K classes.
        algorithm: One of the three above.
    """
    counts = torch.as_tensor(num_gt).tolist()
    area = {"11P": _eleven_point, "AUC": _under_curve, "VOC": _interpolated}[algorithm]
    ap = torch.zeros(len(counts), dtype=torch.float64)
    for index, rows in ranked(scored):
        if counts[index]:
            ap[index] = area(scored.labels[rows], counts[index])
    return ap


def _eleven_point(labels: Tensor, num_gt: int) -> Tensor:
    best = _best_precision(labels)
    at = torch.searchsorted(labels.cumsum(0) / num_gt, RECALLS)
    return best[at[at < len(best)]].sum() / 11


def _interpolated(labels: Tensor, num_gt: int) -> Tensor:
    return (_best_precision(labels) * labels).sum() / num_gt


def _best_precision(labels: Tensor) -> Tensor:
    """The highest precision from each detection on."""
    precision = labels.cumsum(0) / torch.arange(1, len(labels) + 1, dtype=torch.float64)
    return precision.flip(0).cummax(0).values.flip(0)


def _under_curve(labels: Tensor, num_gt: int) -> Tensor:
    precision = labels.cumsum(0) / torch.arange(1, len(labels) + 1, dtype=torch.float64)
    before = torch.cat([precision[:1], precision[:-1]])
    counted = labels.nonzero().squeeze(1)[:-1]
    return (precision[counted] + before[counted]).sum() / 2 / num_gt


def known_object(scored: Scored, annotated_objects: Tensor, object_of_class: Tensor) -> Scored:
    """Keep the detections that count in HICO-DET's Known-Object setting (Chao et al., WACV 2018).

    A class counts in the images that have an annotation of its object.

    Args:
        scored: The detections.
        annotated_objects: Which of O objects the annotations of each image contain, [I, O] bool.
        object_of_class: The object of each class, [K] int64.
    """
    counts = annotated_objects[scored.image, object_of_class[scored.classes]]
    return Scored(scored.scores[counts], scored.classes[counts], scored.labels[counts], scored.image[counts])


class DetectionAP:
    """Collects detections for the 11-point AP of `average_precision`.

    Args:
        num_classes: Number of classes.
        num_gt: Annotated pairs of each class.
    """

    def __init__(self, num_classes: int, num_gt: Sequence[int]) -> None:
        if len(num_gt) != num_classes:
            raise ValueError(f"{len(num_gt)} counts of annotations for {num_classes} classes")
        self.num_gt = list(num_gt)
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def append(self, scores: Tensor, classes: Tensor, labels: Tensor) -> None:
        """Add detections: scores [M], classes [M], labels [M] of 0 and 1."""
        self._parts.append((scores.double().cpu(), classes.long().cpu(), labels.double().cpu()))

    def compute(self) -> Tensor:
        """AP of each class, float64 [num_classes]; zero for a class without detections or annotations."""
        if not self._parts:
            return torch.zeros(len(self.num_gt), dtype=torch.float64)
        scores, classes, labels = (torch.cat(column) for column in zip(*self._parts, strict=True))
        return average_precision(Scored(scores, classes, labels, torch.zeros_like(classes)), self.num_gt)

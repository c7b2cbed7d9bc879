"""Average precision of detected pairs, as HICO-DET's protocol and EZ-HOI's evaluation have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Algorithm = Literal["11P", "AUC"]


@dataclass(frozen=True, eq=False)
class Scored:
    """All M scored detections of one variant over I images and K interaction classes.

    scores [M] float64, classes [M] int64, labels [M] float64 (1: true positive), image [M] int64.
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
    """Which annotation each detection of one interaction class belongs to [M] int64, and whether it overlaps enough [M].

    gt, detected: human and object boxes, [G, 4] and [M, 4] each, xyxy, G at least one. A detection belongs to the
    annotation with which the smaller of its two IoUs is largest, and counts if that exceeds `min_iou`
    (Chao et al., WACV 2018).
    """
    iou, belongs = torch.minimum(box_iou(gt[0], detected[0]), box_iou(gt[1], detected[1])).max(0)
    return belongs, iou > min_iou


def associate_pairs(
    gt: tuple[Tensor, Tensor], detected: tuple[Tensor, Tensor], scores: Tensor, min_iou: float = 0.5
) -> Tensor:
    """Which detections of one interaction class are true positives: float [M], 0 or 1.

    As `matches` says; of the detections that belong to one annotation the best scored is the true positive.
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


class DetectionAP:
    """Collects scored detections by class; 11-point interpolated AP (Everingham et al., VOC 2007), in float64.

    num_gt: annotated pairs of each class.
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
        ap = torch.zeros(len(self.num_gt), dtype=torch.float64)
        if not self._parts:
            return ap
        scores, classes, labels = (torch.cat(column) for column in zip(*self._parts, strict=True))
        order = torch.argsort(classes, stable=True)
        present, counts = classes[order].unique_consecutive(return_counts=True)
        rows = order.split(counts.tolist())
        for index, row in zip(present.tolist(), rows, strict=True):
            ap[index] = _eleven_point(scores[row], labels[row], self.num_gt[index])
        return ap


def _eleven_point(scores: Tensor, labels: Tensor, num_gt: int) -> Tensor:
    if num_gt == 0:
        return torch.zeros((), dtype=torch.float64)
    true = labels[scores.argsort(descending=True)].cumsum(0)
    precision = true / torch.arange(1, len(true) + 1, dtype=torch.float64)
    recall = true / num_gt
    best = precision.flip(0).cummax(0).values.flip(0)  # the highest precision from here on
    at = torch.searchsorted(recall, torch.linspace(0, 1, 11, dtype=torch.float64))
    return best[at[at < len(best)]].sum() / 11

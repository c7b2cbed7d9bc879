"""Average precision of detected pairs, as in HICO-DET's protocol and EZ-HOI's evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Algorithm = Literal["11P", "AUC", "VOC"]
IntArray = NDArray[np.integer[Any]]
MIN_IOU = 0.5  # a detection overlaps an annotation enough above this
RECALLS = torch.linspace(0, 1, 11, dtype=torch.float64).tolist()  # where "11P" reads the curve


@dataclass(frozen=True, eq=False)
class Scored:
    """All M scored detections of one variant over I images and K interaction classes.

    Attributes:
        scores: [M] float32 or float64.
        classes: [M] int64 or int32.
        labels: [M], 1 or True for a true positive.
        image: Position of the image, [M] int64 or int32.
    """

    scores: Tensor
    classes: Tensor
    labels: Tensor
    image: Tensor


class Column:
    """A column [M] of `Scored` that grows. A list of small tensors would fragment the memory.

    Args:
        dtype: Of the values.
        room: Number of values that fit without a copy. Copies fragment the memory; unfilled room takes none.
    """

    def __init__(self, dtype: torch.dtype, room: int = 0) -> None:
        self._buffer, self._size = torch.empty(room, dtype=dtype), 0

    def extend(self, values: Tensor) -> None:
        """Append values [n]."""
        end = self._size + len(values)
        if end > len(self._buffer):
            larger = self._buffer.new_empty(max(end, 2 * len(self._buffer)))
            larger[: self._size] = self.tensor
            self._buffer = larger
        self._buffer[self._size : end] = values
        self._size = end

    @property
    def tensor(self) -> Tensor:
        """All values so far, not copied."""
        return self._buffer[: self._size]


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [N, M] of boxes [N, 4] and [M, 4], xyxy."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = (high - low).clamp_min(0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
    return inter / (area_a[:, None] + area_b[None] - inter)


def matches(
    gt: tuple[Tensor, Tensor], detected: tuple[Tensor, Tensor], min_iou: float = MIN_IOU
) -> tuple[Tensor, Tensor]:
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
    iou, belongs = overlap(gt, detected).max(0)
    return belongs, iou > min_iou


def overlap(gt: tuple[Tensor, Tensor], detected: tuple[Tensor, Tensor]) -> Tensor:
    """The smaller of the IoUs of humans and of objects [G, M], of boxes [G, 4] and [M, 4] each."""
    return torch.minimum(box_iou(gt[0], detected[0]), box_iou(gt[1], detected[1]))


def associate_pairs(
    gt: tuple[Tensor, Tensor], detected: tuple[Tensor, Tensor], scores: Tensor, min_iou: float = MIN_IOU
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
    """Yield every detected class with the positions of its detections [m], best scored first.

    Equal scores are ranked by torch's plain argsort, as pocket ranks them. They occur where two pairs share a feature. In a class
    with one annotation their order decides between an AP of 1 and of 1/2.
    """
    classes, order = scored.classes, None
    if not (classes[1:] >= classes[:-1]).all():  # where they come sorted, a copy and the memory for its order are saved
        classes, order = classes.sort(stable=True)
    present, counts = classes.unique_consecutive(return_counts=True)
    begin = 0
    for index, count in zip(present.tolist(), counts.tolist(), strict=True):
        rows = torch.arange(begin, begin + count) if order is None else order[begin : begin + count]
        yield index, rows[scored.scores[rows].double().argsort(descending=True)]  # pocket's are float64 too
        begin += count


def average_precision(scored: Scored, num_gt: Sequence[int] | Tensor, algorithm: Algorithm = "11P") -> Tensor:
    """AP of each class, float64 [K] in 0..1; zero for a class without detections or annotations.

    Args:
        scored: The detections.
        num_gt: Annotated pairs of each of the K classes.
        algorithm: One of those of `area`.
    """
    counts = torch.as_tensor(num_gt).tolist()
    ap = torch.zeros(len(counts), dtype=torch.float64)
    for index, rows in ranked(scored):
        true = scored.labels[rows].nonzero().numpy()
        if len(true) and counts[index]:
            ap[index] = float(area(np.ones_like(true), true + 1, np.array([counts[index]]), algorithm)[0])
    return ap


def area(copies: IntArray, detections: IntArray, annotated: IntArray, algorithm: Algorithm) -> NDArray[np.float64]:
    """AP of one class in R samples of the images, [R] in 0..1.

    "11P": precision interpolated at eleven recalls (Everingham et al., VOC 2007), as EZ-HOI reports it.
    "AUC": the area under the curve, as pocket's DetectionAPMeter computes it. Straight lines join the points of the curve,
    and it ends before the last true positive: of T true positives T − 1 count, so a class with one has an AP of zero.
    "VOC": the area under the curve with precision interpolated at every recall (Everingham et al., VOC 2010), as V-COCO's
    tool computes it.

    Between two true positives precision only falls and recall stays, so all that a sample needs is what its curve has at
    each true positive. An image that was drawn twice has its detections twice.

    Args:
        copies: How often each of the T true positives occurs, best scored first, [T, R].
        detections: Number of detections down to the last copy of each true positive, [T, R].
        annotated: Annotated pairs, [R], at least 1.
        algorithm: One of the three above.
    """
    return {"11P": _eleven_point, "AUC": _under_curve, "VOC": _interpolated}[algorithm](copies, detections, annotated)


def _eleven_point(copies: IntArray, detections: IntArray, annotated: IntArray) -> NDArray[np.float64]:
    true = np.cumsum(copies, axis=0, dtype=np.int32)
    best = _best_precision(true, detections)
    # where each recall is reached [11, R]: to compare every true positive with every recall takes longer
    by_sample = [torch.from_numpy(np.ascontiguousarray(x.T)) for x in (true, _needed(annotated))]
    at = np.ascontiguousarray(torch.searchsorted(*by_sample).numpy().T)
    precision = np.take_along_axis(best, np.minimum(at, len(best) - 1), axis=0)
    return _total(np.where(at < len(best), precision, 0.0)) / len(RECALLS)


def _needed(annotated: IntArray) -> IntArray:
    """True positives [11, R] that each recall takes: the smallest t with t / annotated >= recall, as floats have it."""
    recalls = np.array(RECALLS)[:, None]
    needed = np.ceil(recalls * annotated)
    needed -= (needed - 1) / annotated >= recalls
    needed += needed / annotated < recalls
    return needed.astype(np.int32)


def _interpolated(copies: IntArray, detections: IntArray, annotated: IntArray) -> NDArray[np.float64]:
    # over copies of a true positive precision rises, so the last copy's is the highest of them
    true = np.cumsum(copies, axis=0, dtype=np.int32)
    return _total(copies * _best_precision(true, detections)) / annotated


def _best_precision(true: IntArray, detections: IntArray) -> NDArray[np.float64]:
    """The highest precision from the last copy of each true positive on, [T, R], given their number down to there."""
    return np.maximum.accumulate((true / np.maximum(detections, 1))[::-1])[::-1]


def _under_curve(copies: IntArray, detections: IntArray, annotated: IntArray) -> NDArray[np.float64]:
    """The area under straight lines.

    The curve rises over c copies of a true positive, from t of n detections: its heights are (t + j) / (n + j), j = 0..c,
    that is 1 - (n - t) / (n + j), and the sum of these has a closed form in harmonic numbers. It begins at 1, if it
    begins with a true positive.
    """
    true = np.cumsum(copies, axis=0, dtype=np.int32)
    last = (copies > 0) & (true == true[-1])  # whose last copy does not count
    copies, true, detections = copies - last, true - last, detections - last
    before = detections - copies
    harmonic = np.r_[0, np.cumsum(1 / np.arange(1, 1 + detections.max()))]
    heights = copies - (detections - true) * (harmonic[detections] - harmonic[before])  # j = 1..c
    start = np.divide(true - copies, before, out=np.ones(true.shape), where=before > 0)  # j = 0
    end = np.divide(true, detections, out=np.ones(true.shape), where=detections > 0)  # j = c
    return _total(heights + (start - end) / 2) / annotated


def _total(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum [R] of [T, R] over T, with the same bits for one column as for many: `sum` adds pairwise in one, in order in many."""
    return np.asarray(np.cumsum(values, axis=0)[-1])


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

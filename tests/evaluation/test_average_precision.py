"""AP and association against definitions written out in loops, and against cases done by hand."""

from __future__ import annotations

import contextlib
import io
import os
import sys

import numpy as np
import pytest
import torch

from ezhoi_diffusion.evaluation.average_precision import (
    RECALLS,
    Scored,
    _needed,
    associate_pairs,
    average_precision,
    box_iou,
    known_object,
)
from helpers.detections import random_scored


def ap_by_definition(scores, labels, num_gt):
    ranked = [label for _, label in sorted(zip(scores, labels, strict=True), key=lambda pair: -pair[0])]
    points = [(sum(ranked[: k + 1]) / (k + 1), sum(ranked[: k + 1]) / num_gt) for k in range(len(ranked))]
    total = 0.0
    for t in torch.linspace(0, 1, 11, dtype=torch.float64).tolist():
        total += max((p for p, r in points if r >= t), default=0.0) / 11
    return total


@pytest.mark.parametrize("seed", range(50))
def test_ap_is_eleven_point_interpolation(seed):
    generator = torch.Generator().manual_seed(seed)
    classes, num_gt = 5, [4, 9, 30, 1, 7]
    images, kept = [], {c: ([], []) for c in range(classes)}
    left = list(num_gt)
    for _ in range(6):  # several images
        n = int(torch.randint(0, 12, (), generator=generator))
        scores = torch.rand(n, generator=generator)
        of = torch.randint(0, classes - 1, (n,), generator=generator)  # the last class is never detected
        labels = torch.zeros(n)
        for i in range(n):
            c = int(of[i])
            if left[c] and torch.rand((), generator=generator) < 0.5:
                labels[i], left[c] = 1, left[c] - 1
            kept[c][0].append(float(scores[i].double()))
            kept[c][1].append(float(labels[i]))
        images.append((scores, of, labels, of))
    scored = Scored(*map(torch.cat, zip(*images, strict=True)))
    expected = [ap_by_definition(*kept[c], num_gt[c]) for c in range(classes)]
    assert average_precision(scored, num_gt).tolist() == pytest.approx(expected, abs=1e-12)


def area_by_definition(scores, labels, num_gt):
    """Trapezoids between neighbouring points of the curve, but for the one that reaches the highest recall."""
    ranked = [label for _, label in sorted(zip(scores, labels, strict=True), key=lambda pair: -pair[0])]
    curve = [(sum(ranked[: k + 1]) / num_gt, sum(ranked[: k + 1]) / (k + 1)) for k in range(len(ranked))]
    area, (left, height) = 0.0, (0.0, curve[0][1] if curve else 0.0)
    for recall, precision in curve:
        if recall < sum(ranked) / num_gt:
            area += (recall - left) * (precision + height) / 2
        left, height = recall, precision
    return area


@pytest.mark.parametrize("seed", range(100))
def test_both_algorithms_are_their_definitions(seed):
    scored, annotations = random_scored(seed, 1 + seed % 20, 4)
    num_gt = annotations.sum(0)
    for algorithm, definition in (("11P", ap_by_definition), ("AUC", area_by_definition)):
        expected = [
            definition(scored.scores[of].tolist(), scored.labels[of].tolist(), count) if count else 0
            for of, count in ((scored.classes == c, int(num_gt[c])) for c in range(4))
        ]
        found = average_precision(scored, num_gt, algorithm)
        assert found.tolist() == pytest.approx(expected, abs=1e-12)
        assert torch.equal(average_precision(scored, num_gt.tolist(), algorithm), found)


def test_area_by_hand():
    def area(labels, num_gt):
        zero = torch.zeros(len(labels), dtype=torch.long)
        scored = Scored(-torch.arange(len(labels)).double(), zero, torch.tensor(labels).double(), zero)
        return average_precision(scored, [num_gt], "AUC").item()

    assert area([1, 1, 1, 1], 4) == pytest.approx(3 / 4)  # the fourth ends the curve
    assert area([1, 0, 1, 1], 4) == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 4)
    assert area([0, 1, 1], 2) == pytest.approx((0 + 1 / 2) / 2 / 2)
    assert area([1], 1) == area([0, 0], 1) == area([], 1) == area([0], 0) == 0


@pytest.fixture(scope="module")
def pocket_meter():
    """The meter of EZ-HOI's evaluation, where it is installed or POCKET_ROOT has a checkout."""
    with pytest.MonkeyPatch.context() as patch:
        if root := os.environ.get("POCKET_ROOT"):
            patch.syspath_prepend(root)
        yield pytest.importorskip("pocket").utils.DetectionAPMeter
    for name in [name for name in sys.modules if name.split(".")[0] == "pocket"]:
        del sys.modules[name]  # a comparison would take it for EZ-HOI's


@pytest.mark.parametrize("algorithm", ["11P", "AUC"])
def test_both_algorithms_are_those_of_pocket(pocket_meter, algorithm):
    detections = 0
    for seed in range(300):
        scored, annotations = random_scored(seed, 1 + seed % 50, 1 + seed % 6)
        num_gt = annotations.sum(0).tolist()
        meter = pocket_meter(len(num_gt), num_gt=num_gt, nproc=1, algorithm=algorithm)
        meter.append(scored.scores, scored.classes, scored.labels)
        with contextlib.redirect_stdout(io.StringIO()):  # a warning for each class without detections
            expected = meter.eval()
        torch.testing.assert_close(average_precision(scored, num_gt, algorithm), expected, rtol=0, atol=1e-12)
        detections += len(scored.scores)
    assert detections > 10_000


def tied(seed: int) -> tuple[Scored, list[int]]:
    """Detections of four classes, two and more of each score; the classes take turns."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(40, generator=generator, dtype=torch.float64).repeat_interleave(8)
    labels = (torch.rand(320, generator=generator) < 0.05).double()
    classes = torch.arange(320) % 4
    num_gt = [max(1, int(labels[classes == c].sum())) for c in range(4)]
    return Scored(scores, classes, labels, classes), num_gt


def test_equal_scores_are_ranked_as_by_a_plain_argsort():
    differs = 0
    for seed in range(50):
        scored, num_gt = tied(seed)
        expected, stable = [], []
        for c in range(4):
            scores, labels = scored.scores[scored.classes == c], scored.labels[scored.classes == c]
            for found, order in (
                (expected, scores.argsort(descending=True)),
                (stable, scores.argsort(descending=True, stable=True)),
            ):
                distinct = torch.arange(len(scores), 0, -1).tolist()
                found.append(ap_by_definition(distinct, labels[order].tolist(), num_gt[c]))
        assert average_precision(scored, num_gt).tolist() == pytest.approx(expected, abs=1e-12)
        order = scored.classes.argsort(stable=True)
        by_class = Scored(*(column[order] for column in vars(scored).values()))
        assert torch.equal(average_precision(by_class, num_gt), average_precision(scored, num_gt))
        differs += expected != stable
    assert differs, "these ties must matter"


def test_equal_scores_are_ranked_as_pocket_ranks_them(pocket_meter):
    for seed in range(50):
        scored, num_gt = tied(seed)
        meter = pocket_meter(4, num_gt=num_gt, nproc=1, algorithm="11P")
        meter.append(scored.scores, scored.classes, scored.labels)
        torch.testing.assert_close(average_precision(scored, num_gt), meter.eval(), rtol=0, atol=1e-12)


def test_known_object_drops_what_lies_in_images_without_the_object():
    # classes 0 and 1 have object 0, class 2 has object 1; image 0 holds object 0, image 1 object 1, image 2 neither
    annotated = torch.tensor([[True, False], [False, True], [False, False]])
    image, classes = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]), torch.tensor([0, 1, 2] * 3)
    labels = torch.tensor([1, 0, 0, 0, 0, 1, 0, 0, 0], dtype=torch.float64)
    scores = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.8, 0.4, 0.7, 0.6, 0.5], dtype=torch.float64)
    scored = Scored(scores, classes, labels, image)
    known = known_object(scored, annotated, torch.tensor([0, 0, 1]))
    assert known.scores.tolist() == [0.1, 0.2, 0.4]
    assert known.classes.tolist() == [0, 1, 2]
    assert known.labels.tolist() == [1, 0, 1]
    assert known.image.tolist() == [0, 0, 1]
    assert average_precision(scored, [1, 0, 1]).tolist() == pytest.approx([1 / 3, 0, 1 / 2])
    assert average_precision(known, [1, 0, 1]).tolist() == pytest.approx([1, 0, 1])


def test_ap_by_hand():
    classes = torch.tensor([0, 0, 0, 2])
    scored = Scored(torch.tensor([0.9, 0.8, 0.7, 0.5]), classes, torch.tensor([1.0, 0.0, 1.0, 0.0]), classes)
    # recall .5 at precision 1 (6 of the 11 points), recall 1 at precision 2/3 (5 points)
    assert average_precision(scored, [2, 1, 0]).tolist() == pytest.approx([(6 + 5 * 2 / 3) / 11, 0, 0])
    nothing = torch.zeros(0, dtype=torch.long)
    assert average_precision(Scored(nothing.float(), nothing, nothing.float(), nothing), [1, 1]).tolist() == [0, 0]


def test_labels_of_single_precision_count_as_those_of_double():
    # 7 / 10 of float32 lies below the seventh of the eleven recalls
    classes = torch.zeros(7, dtype=torch.long)
    for dtype in (torch.float32, torch.float64):
        scored = Scored(torch.arange(7).flip(0).to(dtype), classes, torch.ones(7, dtype=dtype), classes)
        assert average_precision(scored, [10]).item() == pytest.approx(8 / 11, abs=1e-15)


def test_a_recall_is_reached_where_a_division_of_floats_reaches_it():
    """3 of 10 do not reach the fourth of them, which is 0.30000000000000004."""
    for annotated in [*range(1, 400), 9999, 29010]:
        expected = [next(t for t in range(annotated + 1) if t / annotated >= recall) for recall in RECALLS]
        assert _needed(np.array([annotated])).squeeze(1).tolist() == expected


def test_box_iou():
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1]])
    b = torch.tensor([[1.0, 1, 3, 3], [5, 5, 6, 6], [0, 0, 2, 2]])
    assert torch.allclose(box_iou(a, b), torch.tensor([[1 / 7, 0, 1], [0, 0, 1 / 4]]))


def test_association_takes_the_best_scored_of_each_annotation():
    box = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    near = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 4]])
    labels = associate_pairs((box, box), (near, near), torch.tensor([0.9, 0.5, 0.1, 1.0]))
    assert labels.tolist() == [1, 0, 1, 0]  # the second belongs to the same annotation, the fourth overlaps too little


def test_association_needs_both_boxes_and_more_than_the_threshold():
    human, other = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 4, 4]])
    far = torch.tensor([[50.0, 50, 60, 60]])
    assert associate_pairs((human, other), (human, far), torch.tensor([0.9])).tolist() == [0]
    half = torch.tensor([[0.0, 0, 10, 5]])  # an IoU of exactly one half
    assert associate_pairs((human, other), (half, other), torch.tensor([0.9])).tolist() == [0]
    nothing = torch.zeros(0, 4)
    assert associate_pairs((nothing, nothing), (human, other), torch.tensor([0.9])).tolist() == [0]
    assert associate_pairs((human, other), (nothing, nothing), torch.zeros(0)).tolist() == []

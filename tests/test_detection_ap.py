"""AP and association against definitions written out the long way, and against cases done by hand."""

from __future__ import annotations

import pytest
import torch

from ezhoi_diffusion.evaluation.detection_ap import DetectionAP, associate_pairs, box_iou


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
    meter, kept = DetectionAP(classes, num_gt), {c: ([], []) for c in range(classes)}
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
        meter.append(scores, of, labels)
    expected = [ap_by_definition(*kept[c], num_gt[c]) for c in range(classes)]
    assert meter.compute().tolist() == pytest.approx(expected, abs=1e-12)


def test_ap_by_hand():
    meter = DetectionAP(3, [2, 1, 0])
    meter.append(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 0]), torch.tensor([1.0, 0.0, 1.0]))
    meter.append(torch.tensor([0.5]), torch.tensor([2]), torch.tensor([0.0]))
    # recall .5 at precision 1 (6 of the 11 points), recall 1 at precision 2/3 (5 points)
    assert meter.compute().tolist() == pytest.approx([(6 + 5 * 2 / 3) / 11, 0, 0])
    assert DetectionAP(2, [1, 1]).compute().tolist() == [0, 0]
    with pytest.raises(ValueError, match="2 counts of annotations for 3 classes"):
        DetectionAP(3, [1, 1])


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

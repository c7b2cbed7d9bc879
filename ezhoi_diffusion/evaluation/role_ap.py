"""V-COCO's role AP (Gupta & Malik, "Visual Semantic Role Labeling", arXiv:1505.04474, 2015), as its own tool has it.

A person acts, and the action has roles: who cuts has something that is cut and something to cut with. A detection is a
person's box, an action-role, and the box of what fills the role. AP is `average_precision(…, "VOC")` of each action-role.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_IOU = 0.5
# What a detection of a role must be where an annotated person acts and the role has no box: empty, as something may be
# hidden; or anything, as something may be of no category.
SCENARIOS = ("scenario 1", "scenario 2")


@dataclass(frozen=True, eq=False)
class RoleAnnotations:
    """The G persons of one image, and what they do: R action-roles. Boxes are xyxy in pixels of the picture, float32.

    boxes [G, 4]. known [G] bool: False where nobody annotated what a person does. acts [G, R] bool: whether a person does
    the action of an action-role. roles [G, R, 4]: what fills it, NaN where nothing is annotated.
    """

    boxes: Tensor
    known: Tensor
    acts: Tensor
    roles: Tensor

    def counts(self) -> Tensor:
        """[2R] int64 persons to be found, for each action-role in scenario 1, then in scenario 2."""
        return self.acts.sum(0).repeat(2)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [...] of boxes [..., 4] and [..., 4], xyxy, where both corners are pixels of the box."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inter = (high - low + 1).clamp_min(0).prod(-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2] + 1).prod(-1) for x in (a, b))
    return inter / (area_a + area_b - inter)


def match_roles(
    annotated: RoleAnnotations, persons: Tensor, others: Tensor, role: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What M detections of one image are worth: (kept [N], classes [N], candidate [C], annotation [C]), all int64.

    persons [M, 4], others [M, 4] float32: the boxes of a detection, the second zeros or NaN for an empty role. role [M]
    int64 action-role. A detection belongs to the person it overlaps most. Those whose person somebody annotated are kept,
    once for each scenario, in classes 0..2R-1. Candidates are the kept ones that are right: their person acts so, and both
    boxes overlap theirs by half or more. Of the candidates of one annotation, which is a number for a person and a class, the
    best scored is the true positive.
    """
    classes = torch.cat([role, role + annotated.acts.shape[1]])
    if len(annotated.boxes) == 0:
        nothing = role.new_zeros(0)
        return torch.arange(len(role)).repeat(2), classes, nothing, nothing
    iou, person = overlap(annotated.boxes[:, None], persons[None]).max(0)
    expected = annotated.roles[person, role]
    missing = expected.isnan().all(1)
    empty = (others == 0).all(1) | others.isnan().all(1)
    filled = ~missing & (overlap(expected, others) >= MIN_IOU)
    acting = annotated.acts[person, role] & (iou >= MIN_IOU)
    right = torch.cat([acting & (filled | missing & empty), acting & (filled | missing)])
    counts = annotated.known[person].repeat(2).nonzero().squeeze(1)
    kept, classes = counts % len(role), classes[counts]
    candidate = right[counts].nonzero().squeeze(1)
    annotation = person[kept[candidate]] * 2 * annotated.acts.shape[1] + classes[candidate]
    return kept, classes, candidate, annotation

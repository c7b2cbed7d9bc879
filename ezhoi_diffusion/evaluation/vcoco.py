"""V-COCO's role AP (Gupta & Malik, "Visual Semantic Role Labeling", arXiv:1505.04474, 2015), as its own tool computes it.

EZ-HOI cannot evaluate V-COCO. A person acts, and the action has roles: whoever cuts has an object and an instrument. A
detection is a person's box, an action-role, and the box of what fills the role. AP is `average_precision(…, "VOC")` of each
action-role. Where an annotated person acts and the role has no box, scenario 1 expects an empty role, because the thing may
be hidden. Scenario 2 accepts any box, because the thing may belong to no category.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from ezhoi_diffusion.evaluation.comparison import FULL
from ezhoi_diffusion.evaluation.protocols import EvalProtocol, scored_pairs
from ezhoi_diffusion.evaluation.vcoco_annotations import RoleAnnotations, Vcoco, read_vcoco
from ezhoi_diffusion.features.images import StoredImage
from ezhoi_diffusion.features.score import EzHoiScore, ScoreError, names_of_interactions
from ezhoi_diffusion.features.store import FeatureStore

MIN_IOU = 0.5
SCENARIOS = ("scenario 1", "scenario 2")


def vcoco_protocol(store: FeatureStore, folder: Path) -> EvalProtocol:
    """V-COCO's protocol, for a capture of one of its splits.

    Classes are V-COCO's R action-roles in scenario 1, then in scenario 2; the full group is both. EZ-HOI has no class for one
    action-role, `point-instr`, whose AP is 0. Where it lacks any, further groups leave them out.

    Args:
        store: The capture.
        folder: V-COCO's annotations, see `read_vcoco`.

    Raises:
        ScoreError: The capture is of another data set, or names unknown actions.
        VcocoError: The annotations cannot be read.
    """
    if store.fingerprint.get("dataset") != "vcoco":
        raise ScoreError(
            f"{store.folder} is a capture of {store.fingerprint.get('dataset')}, not of V-COCO: leave --vcoco out"
        )
    data = read_vcoco(folder, [str(image["name"]) for image in store.images])
    role = _roles(store, data)
    count = len(data.roles)
    captured = {image["name"] for image in store.images}
    uncaptured = [one.counts() for name, one in data.annotations.items() if name not in captured]
    groups = {name: torch.arange(count) + number * count for number, name in enumerate(SCENARIOS)}
    own = role.sort().values
    if len(own) < count:
        groups |= {f"{name} of {len(own)}": index[own] for name, index in groups.items()}
    groups = {FULL: torch.arange(2 * count), **groups}
    return EvalProtocol(
        match=functools.partial(_detections, EzHoiScore.from_store(store), data, role),
        count=lambda image: data.annotations[str(image.name)].counts(),
        groups=groups,
        names=[f"{name}, {scenario}" for scenario in SCENARIOS for name in data.roles],
        uncaptured=torch.stack(uncaptured) if uncaptured else torch.zeros(0, 2 * count, dtype=torch.long),
        algorithm="VOC",
    )


def _roles(store: FeatureStore, data: Vcoco) -> Tensor:
    """The action-role [C] int64 of each of EZ-HOI's target classes: `hit instr` is `hit-instr`."""
    names = names_of_interactions(store)
    if names is None:
        raise ScoreError(f"{store.folder} does not name V-COCO's actions: capture it again with this version")
    unknown = [name for name in names if name.replace(" ", "-") not in data.roles]
    if unknown:
        raise ScoreError(
            f"{store.folder}: V-COCO has no action-role called {', '.join(unknown)}; it has {', '.join(data.roles)}"
        )
    return torch.tensor([data.roles.index(name.replace(" ", "-")) for name in names])


def _detections(score: EzHoiScore, data: Vcoco, role: Tensor, image: StoredImage) -> tuple[Tensor, ...]:
    """Detections as EZ-HOI caches them: a person's box, an action-role, the other box, in pixels of the picture."""
    row, target, prior = scored_pairs(score, image.pairs)
    scale = data.sizes[str(image.name)] / image.pairs.size.flip(0)
    humans, others = (image.pairs.boxes * scale.repeat(2))[image.pairs.pairing[:, row]]
    annotated = data.annotations[str(image.name)]
    kept, classes, candidate, annotation = match_roles(annotated, humans, others, role[target])
    return row[kept], target[kept], classes, prior[kept], candidate, annotation


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """IoU [...] of boxes [..., 4] and [..., 4], xyxy. Both corners are pixels of the box, as in V-COCO's tool."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inter = (high - low + 1).clamp_min(0).prod(-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2] + 1).prod(-1) for x in (a, b))
    return inter / (area_a + area_b - inter)


def match_roles(
    annotated: RoleAnnotations, persons: Tensor, others: Tensor, role: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Match M detections of one image to its annotations, in both scenarios.

    A detection belongs to the person it overlaps most. It is kept if somebody annotated what that person does, once for each
    scenario, in classes 0..2R−1. It is right if the person acts so and both boxes overlap theirs by half or more. Of the
    candidates of one annotation, the best scored is the true positive.

    Args:
        annotated: The image's persons.
        persons: Detected persons [M, 4] float32.
        others: Detected boxes of what fills the role, [M, 4] float32; zeros or NaN for an empty role.
        role: The action-role [M] int64.

    Returns:
        Kept detections [N], their classes [N], those of them that are right [C], and the annotation of each [C]; all int64.
        An annotation is a number for a person and a class.
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

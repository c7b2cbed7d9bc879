"""Headroom: mean AP if one part of the scores were perfect, on the same detections.

Right is a scored combination of pair and class that overlaps an annotation of its class. Interacting is a pair with one.

verbs: an interacting pair's right classes get its highest probability, its wrong ones 0. Other pairs stay as they are.
interactiveness: all classes of a pair that does not interact get 0. Interacting pairs stay as they are.
labels: right combinations get 1, wrong ones 0.

Detector scores multiply all of them, as in EZ-HOI. What stays missing with perfect labels are people and objects that were
not detected, and combinations for one annotation that compete.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ezhoi_diffusion.evaluation.average_precision import Scored, average_precision, known_object
from ezhoi_diffusion.evaluation.protocols import Detections, EvalProtocol, annotated_objects
from ezhoi_diffusion.features.images import stored_images
from ezhoi_diffusion.features.store import FeatureStore

PERFECT = ("verbs", "interactiveness", "labels")


def headroom(
    store: FeatureStore, protocol: EvalProtocol, groups: Mapping[str, Tensor], chosen: set[int] | None = None
) -> dict[str, dict[str, float]]:
    """Mean AP in percent of each group where one part of EZ-HOI's scores is perfect.

    Args:
        store: Features of the split.
        protocol: How to evaluate.
        groups: Group -> classes [k].
        chosen: Positions of the images; all by default.
    """
    parts: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in PERFECT}
    annotations = []
    for position, image in enumerate(stored_images(store, chosen)):
        annotations.append(protocol.count(image))
        detections = Detections.from_images([image], protocol.match)
        probability = image.logits[detections.row, detections.target].sigmoid().double()
        for name, scores in perfect_scores(detections, probability).items():
            weighed = scores * detections.prior
            where = torch.full_like(detections.classes, position)
            parts[name].append((weighed, detections.classes, detections.labels(weighed), where))
    counts = torch.stack(annotations)
    if chosen is None and not protocol.partial and store.meta.get("max_images") is None:
        counts = torch.cat([counts, protocol.uncaptured])
    found = {}
    for name, columns in parts.items():
        scored = Scored(*(torch.cat(column) for column in zip(*columns, strict=True)))
        if protocol.setting == "known-object":
            scored = known_object(scored, *annotated_objects(store, counts))
        ap = average_precision(scored, counts.sum(0), protocol.algorithm)
        found[name] = {group: 100 * float(ap[index].mean()) for group, index in groups.items()}
    return found


def perfect_scores(detections: Detections, probability: Tensor) -> dict[str, Tensor]:
    """What is perfect -> scores [M] of combinations whose probabilities are `probability` [M], without detector scores."""
    right = torch.zeros(len(probability), dtype=torch.bool)
    right[detections.candidate] = True
    pairs = int(detections.row.max()) + 1 if len(detections.row) else 0
    best = probability.new_zeros(pairs).scatter_reduce(0, detections.row, probability, "amax")
    interacts = torch.zeros(pairs, dtype=torch.bool)
    interacts[detections.row[right]] = True
    interacting = interacts[detections.row]
    return {
        "verbs": torch.where(interacting, best[detections.row] * right, probability),
        "interactiveness": probability * interacting,
        "labels": right.to(probability.dtype),
    }

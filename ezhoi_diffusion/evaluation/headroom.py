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

from ezhoi_diffusion.evaluation.average_precision import Algorithm, Column, Scored, average_precision
from ezhoi_diffusion.evaluation.protocols import Detections

PERFECT = ("verbs", "interactiveness", "labels")


class Headroom:
    """Collects, image by image, what EZ-HOI's detections would score if one part were perfect.

    Args:
        room: As for `Column`.
    """

    def __init__(self, room: int = 0) -> None:
        self._scores = {name: Column(torch.float64, room) for name in PERFECT}
        self._labels = {name: Column(torch.bool, room) for name in PERFECT}

    def add(self, detections: Detections, logits: Tensor) -> None:
        """Add the detections of some images with EZ-HOI's logits [P, C] of their pairs."""
        probability = logits[detections.row, detections.target].sigmoid().double()
        for name, scores in perfect_scores(detections, probability).items():
            weighed = scores * detections.prior
            self._scores[name].extend(weighed)
            self._labels[name].extend(detections.labels(weighed))

    def scored(self, bare: Scored) -> dict[str, Scored]:
        """What is perfect -> the detections of `bare`, with the scores that they get. Nothing of them is kept here."""
        return {
            name: Scored(self._scores.pop(name).tensor, bare.classes, self._labels.pop(name).tensor, bare.image)
            for name in PERFECT
        }


def mean_ap(scored: Scored, num_gt: Tensor, groups: Mapping[str, Tensor], algorithm: Algorithm) -> dict[str, float]:
    """Mean AP in percent of each group of classes. num_gt: annotated pairs of each class [K]."""
    ap = average_precision(scored, num_gt, algorithm)
    return {group: 100 * float(ap[index].mean()) for group, index in groups.items()}


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

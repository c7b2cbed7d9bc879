"""Calibration by object: whether scores of pairs with one object mean what they say."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.features.score import names_of_interactions
from ezhoi_diffusion.features.store import FeatureStore

BINS = 15


class ObjectCalibration:
    """Mean score, annotated rate and calibration error of each object's predictions, over all pairs.

    A prediction is a pair with a target class that its object admits. Its score is sigmoid(logit), without detector scores.
    It is right where the pair overlaps an annotation of the class. The error of an object is the sum over 15 equal bins of
    the bin's share times |mean score − rate right| (Guo et al., ICML 2017).
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(0, BINS, 3, dtype=torch.float64)  # object, bin: predictions, score, right

    def add(self, objects: Tensor, scores: Tensor, right: Tensor) -> None:
        """Add M predictions: object classes [M] int64, scores [M] in 0..1, whether they are right [M] bool."""
        if len(objects) == 0:
            return
        missing = int(objects.max()) + 1 - len(self._sums)
        if missing > 0:
            self._sums = torch.cat([self._sums, self._sums.new_zeros(missing, BINS, 3)])
        bins = (scores * BINS).long().clamp_max(BINS - 1)
        values = torch.stack([torch.ones_like(scores), scores, right.to(scores.dtype)], 1).double()
        self._sums.index_put_((objects, bins), values, accumulate=True)

    def entries(self, names: Mapping[int, str]) -> list[dict[str, Any]]:
        """One entry for each object that was detected. names: object -> name."""
        found = []
        for index, of in enumerate(self._sums):
            number, score, right = of.sum(0).tolist()
            if number:
                error = float((of[:, 1] - of[:, 2]).abs().sum()) / number
                found.append(
                    {
                        "object": names.get(index, f"object {index}"), "predictions": int(number), "mean_score": score / number,
                        "annotated_rate": right / number, "calibration_error": error,
                    }
                )  # fmt: skip
        return found


def object_names(store: FeatureStore) -> dict[int, str]:
    """Object -> the words that the names of all its interactions end with.

    Empty where EZ-HOI gave no names, or names of actions that several objects share, as for V-COCO.
    """
    names, table = names_of_interactions(store), store.ezhoi["object_n_verb_to_interaction"]
    known = table[table >= 0]
    if len(known.unique()) < len(known):
        return {}
    found = {}
    for index, interactions in enumerate(table.tolist()):
        endings = [names[k].split()[::-1] for k in interactions if 0 <= k < len(names)] if names else []
        same = list(itertools.takewhile(lambda words: len(set(words)) == 1, zip(*endings, strict=False)))
        if same:
            found[index] = " ".join(words[0] for words in reversed(same))
    return found

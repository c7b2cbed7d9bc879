"""Folds over images and over verbs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.defaults import MIN_FOLDS
from ezhoi_diffusion.evaluation.protocols import EvalProtocol, hicodet
from ezhoi_diffusion.features.score import targets_of
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.rng import generator


class TuneError(EzhoiDiffusionError):
    """A choice cannot be made, or would not be a fair one."""


def seen_classes(store: FeatureStore) -> Tensor:
    """Interaction classes [k] int64 whose labels may be used. Raises TuneError where the store does not say."""
    if "classes/full" not in store.ezhoi:
        raise TuneError(f"{store.folder} does not say which classes there are: capture it again, into a new folder")
    full = store.ezhoi["classes/full"]
    return full[~torch.isin(full, store.ezhoi.get("classes/unseen", full[:0]))]


@dataclass(frozen=True, eq=False)
class Folds:
    """K folds of images, and J folds of seen interaction classes, of whole verbs.

    Attributes:
        images: Positions of the images in each fold.
        classes: Interaction classes of each fold; every seen class is in one. None where the run hides no class.
        class_weight: Weight of the classes that a fit did not see: the share of unseen classes among all.
    """

    images: list[list[int]]
    classes: list[Tensor]
    class_weight: float

    @classmethod
    def of_store(cls, store: FeatureStore, count: int) -> Folds:
        """Deal images and seen verbs into `count` folds at random. Verbs of similar frequency go into different folds.

        Raises:
            TuneError: There are fewer than 3 folds, or too few images with pairs.
        """
        if count < MIN_FOLDS:
            raise TuneError(
                f"there must be at least {MIN_FOLDS} folds, not {count}: the outer loop leaves out one, the inner another"
            )
        draws = generator(0, "tune folds")
        with_pairs = sum(image["rows"] > 0 for image in store.images)
        order = torch.randperm(len(store.images), generator=draws).tolist()
        images = [sorted(order[fold::count]) for fold in range(count)]
        if not all(any(store.images[one]["rows"] for one in fold) for fold in images):
            raise TuneError(f"{store.folder} has {with_pairs} images with pairs, too few for {count} folds")
        unseen = store.ezhoi.get("classes/unseen", torch.zeros(0, dtype=torch.long))
        if not len(unseen):
            return cls(images, [], 0.0)
        seen, target_of = seen_classes(store), targets_of(store)
        annotated = torch.bincount(store.rows("gt_hoi").long(), minlength=len(target_of))
        verbs, verb_of = target_of[seen].unique(return_inverse=True)
        frequency = torch.zeros(len(verbs), dtype=torch.long).index_add_(0, verb_of, annotated[seen])
        fold_of = torch.empty(len(verbs), dtype=torch.long)
        for block in frequency.argsort(descending=True).split(count):
            fold_of[block] = torch.randperm(count, generator=draws)[: len(block)]
        classes = [seen[fold_of[verb_of] == fold] for fold in range(count)]
        share = len(unseen) / len(store.ezhoi["classes/full"])
        return cls(images, [one for one in classes if len(one)], share)


def protocol_of(store: FeatureStore) -> EvalProtocol:
    """HICO-DET's protocol with annotations of seen classes only."""
    return hicodet(store, classes=seen_classes(store))

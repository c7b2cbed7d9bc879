"""Folds over images and over verbs, and the images of a fold ready to be scored again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.evaluation.average_precision import Scored
from ezhoi_diffusion.evaluation.defaults import MIN_FOLDS
from ezhoi_diffusion.evaluation.protocols import Detections, EvalProtocol, hicodet
from ezhoi_diffusion.evaluation.replay import MAX_PAIRS
from ezhoi_diffusion.evaluation.variants import Variant
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.features.images import StoredImage, stored_images
from ezhoi_diffusion.features.score import targets_of
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.inputs import read_only
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
        classes: Interaction classes of each fold; none where the run hides no class.
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


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The images of one fold.

    Attributes:
        features: Pair features [P, D], on the device.
        logits: EZ-HOI's logits [P, C].
        groups: Rows of images of one size, with their pairs as if of one image, for bridges that work row by row.
        singly: Rows and pairs of each image.
        detections: Those of seen classes.
        image: Position in the store of each detection's image.
    """

    features: Tensor
    logits: Tensor
    groups: list[tuple[Tensor, Pairs]]
    singly: list[tuple[Tensor, Pairs]]
    detections: Detections
    image: Tensor

    @classmethod
    def of_images(
        cls,
        store: FeatureStore,
        positions: Sequence[int],
        protocol: EvalProtocol,
        seen: Tensor,
        device: torch.device | str,
    ) -> HeldOut:
        """Read the images at these positions, and match their pairs with annotations once."""
        images = list(stored_images(store, set(positions)))
        detections = _of_classes(Detections.from_images(images, protocol.match), seen)
        rows = torch.arange(sum(len(image.pairs) for image in images)).split([len(image.pairs) for image in images])
        singly = [(row, image.pairs) for row, image in zip(rows, images, strict=True)]
        return cls(
            torch.cat([image.adapter_feat for image in images]).to(device),
            torch.cat([image.logits for image in images]),
            list(_grouped(images, rows)),
            singly,
            detections,
            torch.tensor(positions)[detections.image],
        )

    def bridged(self, variants: Sequence[Variant]) -> Tensor:
        """Features [P, D] on the CPU after one bridge and the next."""
        x = self.features
        for variant in variants:
            if variant.takes_many_images:
                with read_only(f"bridge '{variant.name}'", adapter_feat=x):
                    x = variant.apply(x, None)
                continue
            parts = self.groups if variant.bridge.row_by_row else self.singly
            after = torch.empty_like(x)
            # around all calls, because a bridge may keep pairs and write in a later one; the features are copies
            with read_only(f"bridge '{variant.name}'", pairs=[pairs for _, pairs in parts]):
                for rows, pairs in parts:
                    after[rows] = variant.apply(x[rows], pairs)
            if variant.bridge.row_by_row:
                self._check_rows(variant, x, after)
            x = after
        return x.cpu()

    def _check_rows(self, variant: Variant, x: Tensor, after: Tensor) -> None:
        rows, pairs = self.singly[0]
        alone = variant.apply(x[rows], pairs)
        if not torch.allclose(alone, after[rows], rtol=1e-3, atol=1e-4 * float(alone.abs().max())):
            raise TuneError(
                f"bridge '{variant.name}' says row_by_row, but its result for an image changes with pairs of other images in the "
                f"same call: compute each feature by itself, or set row_by_row = False"
            )

    def scored(self, logits: Tensor, classes: Tensor | None = None) -> Scored:
        """The detections with the scores that logits [P, C] give them; of some interaction classes, or of all."""
        scores = self.detections.scores(logits)
        labels = self.detections.labels(scores)
        kept = torch.ones_like(scores, dtype=torch.bool)
        if classes is not None:
            kept = torch.isin(self.detections.classes, classes)
        return Scored(scores[kept], self.detections.classes[kept], labels[kept], self.image[kept])


def _of_classes(found: Detections, classes: Tensor) -> Detections:
    """The detections of some classes only; candidates belong to those already."""
    kept = torch.isin(found.classes, classes)
    number = kept.cumsum(0) - 1
    return replace(
        found,
        **{name: getattr(found, name)[kept] for name in ("row", "target", "classes", "prior", "image")},
        candidate=number[found.candidate],
    )


def _grouped(images: Sequence[StoredImage], rows: Sequence[Tensor]) -> list[tuple[Tensor, Pairs]]:
    """Rows and pairs of images of one size together, about MAX_PAIRS at a time."""
    open_groups: dict[tuple[int, ...], list[int]] = {}
    closed: list[list[int]] = []
    for number, image in enumerate(images):
        size = tuple(image.pairs.size.tolist())
        members = open_groups.setdefault(size, [])
        members.append(number)
        if sum(len(rows[one]) for one in members) >= MAX_PAIRS:
            closed.append(open_groups.pop(size))
    merged = []
    for members in [*closed, *open_groups.values()]:
        pairs = [images[one].pairs for one in members]
        first_box = torch.tensor([0, *(len(one.boxes) for one in pairs)]).cumsum(0).tolist()
        boxes, scores, classes = (torch.cat([getattr(one, n) for one in pairs]) for n in ("boxes", "scores", "classes"))
        pairing = torch.cat([one.pairing + begin for one, begin in zip(pairs, first_box, strict=False)], 1)
        together = Pairs(None, 0, pairs[0].size, boxes, scores, classes, pairing)
        merged.append((torch.cat([rows[one] for one in members]), together))
    return merged


def protocol_of(store: FeatureStore) -> EvalProtocol:
    """HICO-DET's protocol with annotations of seen classes only."""
    return hicodet(store, classes=seen_classes(store))

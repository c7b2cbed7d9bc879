"""Scores any number of bridges on stored features, as the host's own evaluation would."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ezhoi_diffusion.evaluation.comparison import REFERENCE, Comparison
from ezhoi_diffusion.evaluation.detection_ap import DetectionAP, matches
from ezhoi_diffusion.evaluation.effect import Effect
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.host.score import (
    Score,
    ScoreError,
    interaction_classes,
    names_of_interactions,
    require_replayable,
)
from ezhoi_diffusion.host.taps import Inject

GROUPS = ("full", "unseen", "seen", "rare", "non-rare")  # a file of tensors keeps no order


@dataclass(frozen=True, eq=False)
class StoredImage:
    """One image of a store: what the host gave for it, and its annotations."""

    name: str | None
    adapter_feat: Tensor  # [P, D]
    logits: Tensor  # [P, C] the host's own
    pairs: Pairs
    labels: Tensor  # [P, C] bool
    gt_boxes: Tensor  # [G, 2, 4]
    gt_hoi: Tensor  # [G]


def stored_images(store: FeatureStore, chosen: set[int] | None = None) -> Iterator[StoredImage]:
    """The images of a store in order, or those at `chosen` positions. Raises FeatureStoreError for a damaged shard."""
    position = 0
    for shard, tensors in zip(store.index["shards"], store.shards(), strict=True):
        at = {"rows": 0, "boxes": 0, "annotations": 0}
        for number, image in enumerate(shard["images"]):
            span = {what: slice(begin, begin + image[what]) for what, begin in at.items()}
            at = {what: piece.stop for what, piece in span.items()}
            if chosen is None or position in chosen:
                rows, boxes, annotations = span["rows"], span["boxes"], span["annotations"]
                pairs = Pairs(
                    image["name"], 0, tensors["sizes"][number], tensors["boxes"][boxes], tensors["scores"][boxes],
                    tensors["classes"][boxes].long(), tensors["pairing"][rows].long().T,
                )  # fmt: skip
                yield StoredImage(
                    image["name"], tensors["adapter_feat"][rows], tensors["logits"][rows], pairs, tensors["labels"][rows],
                    tensors["gt_boxes"][annotations], tensors["gt_hoi"][annotations].long(),
                )  # fmt: skip
            position += 1


@dataclass(frozen=True, eq=False)
class Detections:
    """The M scored (pair, verb) combinations of one image, the same for every bridge, and their candidates for truth."""

    row: Tensor  # [M] pair
    target: Tensor  # [M] verb
    classes: Tensor  # [M] interaction class
    prior: Tensor  # [M]
    candidate: Tensor  # [K] detections that overlap an annotation of their class enough …
    annotation: Tensor  # [K] … and the annotation that each belongs to

    @classmethod
    def of(cls, store: FeatureStore, score: Score, image: StoredImage) -> Detections:
        """As the host's postprocessing and its evaluation form them."""
        pairs = image.pairs
        human, other = pairs.scores[pairs.pairing]
        prior = score.prior(human, other, pairs.objects)
        row, target = prior.nonzero().unbind(1)
        classes = interaction_classes(store, pairs.objects[row], target)
        humans, others = pairs.boxes[pairs.pairing]
        candidate, annotation = [row.new_zeros(0)], [row.new_zeros(0)]
        for hoi in image.gt_hoi.unique():
            found, annotated = (classes == hoi).nonzero().squeeze(1), (image.gt_hoi == hoi).nonzero().squeeze(1)
            gt = image.gt_boxes[annotated]
            belongs, enough = matches((gt[:, 0], gt[:, 1]), (humans[row[found]], others[row[found]]))
            candidate.append(found[enough])
            annotation.append(annotated[belongs[enough]])
        return cls(row, target, classes, prior[row, target], torch.cat(candidate), torch.cat(annotation))

    def scores(self, logits: Tensor) -> Tensor:
        """[M] of logits [P, C]."""
        return logits[self.row, self.target].sigmoid() * self.prior

    def labels(self, scores: Tensor) -> Tensor:
        """[M] of 0 and 1: of the candidates of one annotation the best scored is the true positive."""
        labels = torch.zeros_like(scores)
        for annotation in self.annotation.unique():
            candidates = self.candidate[self.annotation == annotation]
            labels[candidates[scores[candidates].argmax()]] = 1
        return labels


def _average_precision(parts: list[tuple[Tensor, Tensor, Tensor]], num_gt: list[int]) -> Tensor:
    meter = DetectionAP(len(num_gt), num_gt)
    for part in parts:
        meter.append(*part)
    return meter.compute()


def replay(
    store: FeatureStore,
    bridges: Mapping[str, Inject],
    *,
    chosen: set[int] | None = None,
    device: torch.device | str = "cpu",
    forced: list[str] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Comparison:
    """The comparison that `--compare` makes on the host, from what a capture of the split stored.

    `none` has the host's own logits; a bridge has the published score of what it returns for each image's [P, D].
    chosen: positions of the images to take, all by default. device: where bridges get their rows. Raises ScoreError,
    FeatureStoreError, and what a bridge raises.
    """
    if store.fingerprint.get("dataset") != "hicodet":
        raise ScoreError(
            f"{store.folder} is a capture of {store.fingerprint.get('dataset')}, for which the host has no evaluation to compare by"
        )
    score = Score.of(store)
    require_replayable(store, score)
    num_gt = [0] * (int(store.host["object_n_verb_to_interaction"].max()) + 1)
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in (REFERENCE, *bridges)}
    seconds = dict.fromkeys(bridges, 0.0)
    images = pairs = 0
    total = len(store.images) if chosen is None else len(chosen)
    with torch.no_grad():
        for image in tqdm(stored_images(store, chosen), total=total, desc="compare", unit="img", file=sys.stderr):
            images += 1
            for hoi in image.gt_hoi.tolist():
                num_gt[hoi] += 1
            if len(image.pairs) == 0:
                continue
            pairs += len(image.pairs)
            detections = Detections.of(store, score, image)
            for name, parts in found.items():
                logits = image.logits
                if name != REFERENCE:
                    begin = time.perf_counter()
                    bridged = bridges[name](image.adapter_feat.to(device), image.pairs)
                    if bridged is not None:
                        logits = score.logits(bridged.cpu())
                    seconds[name] += time.perf_counter() - begin
                scores = detections.scores(logits)
                parts.append((scores, detections.classes, detections.labels(scores)))
    if not pairs:
        raise ScoreError(
            f"{store.folder}: none of the {images} images has a human-object pair, so nothing can be scored"
        )
    groups = {name: store.host[f"classes/{name}"] for name in GROUPS if f"classes/{name}" in store.host}
    partial = chosen is not None or store.meta.get("max_images") is not None
    if partial:  # of a few images most classes have no annotation, and would only thin the mean
        annotated = torch.tensor(num_gt) > 0
        groups = {name: index[annotated[index]] for name, index in groups.items() if annotated[index].any()}
    return Comparison(
        ap={name: _average_precision(parts, num_gt) for name, parts in found.items()},
        groups=groups,
        images=images,
        pairs=pairs,
        host_ms=None,
        bridge_ms={name: 1000 * spent / images for name, spent in seconds.items()},
        fingerprint=store.fingerprint,
        provenance=provenance or {},
        forced=forced or [],
    )


def effect_of(
    store: FeatureStore, bridge: Inject, chosen: set[int], top: int, device: torch.device | str = "cpu"
) -> Effect:
    """What `bridge` does to the pairs of the images at `chosen` positions; each image's `top` best interactions.

    device: where the bridge gets its rows. Raises ScoreError where the stored features cannot be scored or none of the images has a pair.
    """
    score = Score.of(store)
    names = names_of_interactions(store)
    columns: dict[str, list[Tensor]] = {}
    predictions = []
    with torch.no_grad():
        for image in stored_images(store, chosen):
            if len(image.pairs) == 0:
                continue
            bridged = bridge(image.adapter_feat.to(device), image.pairs)
            after = image.adapter_feat if bridged is None else bridged.cpu()
            row = {
                "before": image.adapter_feat,
                "after": after,
                "logits_before": image.logits,
                "logits_after": score.logits(after),
                "possible": score.object_to_target[image.pairs.objects],
                "labels": image.labels,
            }
            for key, value in row.items():
                columns.setdefault(key, []).append(value)
            detections = Detections.of(store, score, image)
            predictions.append(
                {
                    "image": image.name,
                    "annotated": sorted({_named(names, hoi) for hoi in image.gt_hoi.tolist()}),
                    "before": _best(detections, row["logits_before"], names, top),
                    "after": _best(detections, row["logits_after"], names, top),
                }
            )
    if not predictions:
        raise ScoreError(f"{store.folder}: none of the {len(chosen)} images has a human-object pair")
    return Effect(text=store.text, predictions=predictions, **{key: torch.cat(parts) for key, parts in columns.items()})


def _best(detections: Detections, logits: Tensor, names: list[str] | None, top: int) -> list[dict[str, Any]]:
    scores = detections.scores(logits)
    best = scores.argsort(descending=True, stable=True)[:top]
    return [
        {"interaction": _named(names, hoi), "pair": pair, "score": value, "right": right}
        for hoi, pair, value, right in zip(
            detections.classes[best].tolist(),
            detections.row[best].tolist(),
            scores[best].tolist(),
            detections.labels(scores)[best].bool().tolist(),
            strict=True,
        )
    ]


def _named(names: list[str] | None, hoi: int) -> str:
    return names[hoi] if names else f"interaction {hoi}"

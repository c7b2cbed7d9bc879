"""Scores many variants of the same pairs in one pass over the test split, detector and encoders run once an image."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ezhoi_diffusion.evaluation.comparison import REFERENCE, Comparison
from ezhoi_diffusion.evaluation.detection_ap import DetectionAP, associate_pairs
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.host.capture import to_device
from ezhoi_diffusion.host.host import Host
from ezhoi_diffusion.host.tables import class_groups
from ezhoi_diffusion.host.taps import Inject, Tap

Detections = list[dict[str, Tensor]]


def comparison_pass(host: Host, loader: Any, variants: Mapping[str, Inject]) -> Comparison:
    """Evaluate the bare host, and every variant, on the images of `loader` as the host's own `test_hico` does.

    Every variant is scored by the host's own methods, run again on the encodings of the bare pass.
    Raises TapError where adapter_feat never came by.
    """
    dataset = loader.dataset.dataset
    interactions = torch.from_numpy(np.asarray(dataset.object_n_verb_to_interaction, dtype=float))  # None becomes NaN
    score = _make_scorer(list(dataset.anno_interaction), (REFERENCE, *variants))
    clock = _Clock(host.device)
    images_seen = pairs_seen = 0
    inject: Inject | None = None

    def bridge(feature: Tensor, pairs: Pairs) -> Tensor | None:
        if inject is None:
            return None
        with clock.measure(variant):
            return inject(feature, pairs)

    def add(name: str, detections: Detections) -> None:
        for detected, target in zip(detections, targets, strict=True):
            score.add(name, *_labelled(host.model, score, detected, target, interactions))

    was_training = host.model.training
    host.model.eval()
    tap = Tap(host.model, inject=bridge, point=host.tap_point)
    try:
        with torch.no_grad(), tap, _recording(host.model) as calls:
            for images, targets in tqdm(loader, desc="compare", unit="img", disable=host.rank != 0, file=sys.stderr):
                with clock.measure(REFERENCE):
                    bare = host.model(to_device(images, host.device), to_device(targets, host.device))
                images_seen += len(targets)
                if not bare:
                    continue
                pairs_seen += calls.pairs
                add(REFERENCE, bare)
                for variant, inject in variants.items():  # noqa: B007  `bridge` reads both
                    add(variant, calls.again())
                inject = None
    finally:
        host.model.train(was_training)
    tap.require_hits()
    per_image = 1000 / images_seen
    return Comparison(
        ap=score.compute(),
        groups=class_groups(host),
        images=images_seen,
        pairs=pairs_seen,
        host_ms=clock.seconds[REFERENCE] * per_image,
        bridge_ms={name: clock.seconds.get(name, 0.0) * per_image for name in variants},
        fingerprint=host.fingerprint.to_dict(),
        provenance=dict(host.provenance),
        forced=list(host.forced),
        degraded=host.plugins.degraded,
    )


def _labelled(
    model: Any, score: _Scorer, detected: dict[str, Tensor], target: dict[str, Tensor], interactions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, interaction classes and true-positive labels [M] of one image's detections."""
    detected = to_device(detected, torch.device("cpu"))
    humans, others = detected["boxes"][detected["pairing"]].unbind(0)
    scores, classes = detected["scores"], detected["labels"]
    if model.num_classes == interactions.shape[1]:  # the host predicts verbs; otherwise interactions themselves
        classes = interactions[detected["objects"], classes].long()
    gt_humans, gt_others = (model.recover_boxes(target[key], target["size"]) for key in ("boxes_h", "boxes_o"))
    labels = torch.zeros_like(scores)
    for hoi in target["hoi"].unique():
        rows, annotated = classes == hoi, target["hoi"] == hoi
        if rows.any():
            labels[rows] = score.associate(
                (gt_humans[annotated], gt_others[annotated]), (humans[rows], others[rows]), scores[rows]
            )
    return scores, classes, labels


class _Scorer(Protocol):
    def associate(self, gt: tuple[Tensor, Tensor], detected: tuple[Tensor, Tensor], scores: Tensor) -> Tensor: ...
    def add(self, name: str, scores: Tensor, classes: Tensor, labels: Tensor) -> None: ...
    def compute(self) -> dict[str, Tensor]: ...


def _make_scorer(num_gt: list[int], names: tuple[str, ...]) -> _Scorer:
    """The host's own meter where it brings pocket, so that `none` is what the host prints; else ours."""
    pocket = sys.modules.get("pocket")
    return _PocketScorer(pocket, num_gt, names) if pocket else _OwnScorer(num_gt, names)


class _OwnScorer:
    associate = staticmethod(associate_pairs)

    def __init__(self, num_gt: list[int], names: tuple[str, ...]) -> None:
        self.meters = {name: DetectionAP(len(num_gt), num_gt) for name in names}

    def add(self, name: str, scores: Tensor, classes: Tensor, labels: Tensor) -> None:
        self.meters[name].append(scores, classes, labels)

    def compute(self) -> dict[str, Tensor]:
        return {name: meter.compute() for name, meter in self.meters.items()}


class _PocketScorer:
    def __init__(self, pocket: Any, num_gt: list[int], names: tuple[str, ...]) -> None:
        make = pocket.utils.DetectionAPMeter
        self.meters = {name: make(len(num_gt), nproc=1, num_gt=num_gt, algorithm="11P") for name in names}
        self.associate: Callable[..., Tensor] = pocket.utils.BoxPairAssociation(min_iou=0.5)

    def add(self, name: str, scores: Tensor, classes: Tensor, labels: Tensor) -> None:
        self.meters[name].append(scores, classes, labels)

    def compute(self) -> dict[str, Tensor]:
        with contextlib.redirect_stdout(io.StringIO()):  # a warning for each class without detections
            return {name: meter.eval() for name, meter in self.meters.items()}


class _Clock:
    """Adds up wall time by name, having waited for the device on both sides."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start


class _Calls:
    """The last calls of the host's two scoring methods, to make them again on the same encodings."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.made: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}

    @property
    def pairs(self) -> int:
        """Human-object pairs in the last batch."""
        return sum(len(humans) for humans in self.made["compute_roi_embeddings"][2][2])

    def again(self) -> Detections:
        """Features, logits and detections anew, with whatever is injected now."""
        args, kwargs, _ = self.made["compute_roi_embeddings"]
        logits, priors, humans, others, objects, *_ = self.model.compute_roi_embeddings(*args, **kwargs)
        (boxes, _, _, _, _, _, *sizes), kwargs, _ = self.made["postprocessing"]
        found: Detections = self.model.postprocessing(boxes, humans, others, logits, priors, objects, *sizes, **kwargs)
        return found


@contextmanager
def _recording(model: Any) -> Iterator[_Calls]:
    calls = _Calls(model)
    names = ("compute_roi_embeddings", "postprocessing")
    before = {name: vars(model).get(name) for name in names}

    def record(name: str) -> Callable[..., Any]:
        original = getattr(model, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            calls.made[name] = (args, kwargs, result)
            return result

        return wrapper

    try:
        for name in names:
            setattr(model, name, record(name))
        yield calls
    finally:
        for name, shadowed in before.items():
            if shadowed is None:
                vars(model).pop(name, None)
            else:
                setattr(model, name, shadowed)

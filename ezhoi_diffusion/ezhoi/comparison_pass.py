"""Score many variants in one pass over the test split. Detector and encoders run once an image."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ezhoi_diffusion.defaults import torch_defaults
from ezhoi_diffusion.evaluation.average_precision import Algorithm, Scored, associate_pairs, average_precision
from ezhoi_diffusion.evaluation.comparison import REFERENCE, Comparison
from ezhoi_diffusion.evaluation.variants import Variant
from ezhoi_diffusion.ezhoi.capture_pass import to_device
from ezhoi_diffusion.ezhoi.feature_tap import FeatureTap, Inject
from ezhoi_diffusion.ezhoi.replaced import replaced
from ezhoi_diffusion.ezhoi.run import EzHoiRun
from ezhoi_diffusion.ezhoi.tables import class_groups, interaction_names
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.inputs import read_only

Detections = list[dict[str, Tensor]]


def comparison_pass(run: EzHoiRun, loader: Any, variants: Mapping[str, Variant], replicates: int = 0) -> Comparison:
    """Evaluate bare EZ-HOI and every variant on the images of `loader`, as EZ-HOI's own `test_hico` does.

    EZ-HOI's own methods score every variant. They run again on the encodings of the bare pass.

    Args:
        run: The attached run.
        loader: EZ-HOI's loader of the split.
        variants: Bridges by name.
        replicates: Of the bootstrap over images, 0 for none.

    Raises:
        FeatureTapError: EZ-HOI never computed adapter_feat.
    """
    dataset = loader.dataset.dataset
    interactions = torch.from_numpy(np.asarray(dataset.object_n_verb_to_interaction, dtype=float))  # None becomes NaN
    num_gt = list(dataset.anno_interaction)
    associate = _association()
    found: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in (REFERENCE, *variants)}
    annotations: list[Tensor] = []
    clock = _Clock(run.device)
    images_seen = pairs_seen = 0
    inject: Inject | None = None

    def bridge(feature: Tensor, pairs: Pairs) -> Tensor | None:
        if inject is None:
            return None
        with read_only(f"bridge '{variant}'", adapter_feat=feature, pairs=pairs), clock.measure(variant):
            return inject(feature, pairs)

    def add(name: str, detections: Detections) -> None:
        for image, (detected, target) in enumerate(zip(detections, targets, strict=True), images_seen):
            scores, classes, labels = _labelled(run.model, associate, detected, target, interactions)
            found[name].append((scores, classes, labels, torch.full_like(classes, image)))

    was_training = run.model.training
    run.model.eval()
    tap = FeatureTap(run.model, inject=bridge, point=run.hook_point)
    try:
        with torch.no_grad(), tap, _recording(run.model) as calls:
            for images, targets in tqdm(loader, desc="compare", unit="img", disable=run.rank != 0, file=sys.stderr):
                with clock.measure(REFERENCE):
                    bare = run.model(to_device(images, run.device), to_device(targets, run.device))
                annotations += [torch.bincount(target["hoi"].cpu(), minlength=len(num_gt)) for target in targets]
                if bare:
                    pairs_seen += calls.pairs
                    add(REFERENCE, bare)
                    for variant, chosen in variants.items():
                        inject = chosen.apply
                        add(variant, calls.again())
                    inject = None
                images_seen += len(targets)
    finally:
        run.model.train(was_training)
    tap.require_hits()
    scored = {name: Scored(*map(torch.cat, zip(*parts, strict=True))) for name, parts in found.items()}
    per_image = 1000 / images_seen
    with torch_defaults():
        comparison = Comparison.from_detections(
            scored,
            torch.stack(annotations),
            class_groups(run),
            variants,
            added_ms={name: clock.seconds.get(name, 0.0) * per_image for name in variants},
            num_gt=torch.tensor(num_gt),
            measure=_average_precision,
            replicates=replicates,
            pairs=pairs_seen,
            ezhoi_ms=clock.seconds[REFERENCE] * per_image,
            fingerprint=run.fingerprint.to_dict(),
            forced=list(run.forced),
            degraded=run.plugins.degraded,
            names=interaction_names(run),
        )
    comparison.caveats += comparison.sweep_caveat()
    return comparison


def _association() -> Callable[..., Tensor]:
    """Pocket's if EZ-HOI has imported it, else ours: (gt boxes, detected boxes, scores) -> labels."""
    pocket = sys.modules.get("pocket")
    found: Callable[..., Tensor] = pocket.utils.BoxPairAssociation(min_iou=0.5) if pocket else associate_pairs
    return found


def _average_precision(scored: Scored, num_gt: Tensor, algorithm: Algorithm) -> Tensor:
    """Pocket's if EZ-HOI has imported it, because `none` must equal what EZ-HOI prints; else ours."""
    pocket = sys.modules.get("pocket")
    if pocket is None:
        return average_precision(scored, num_gt, algorithm)
    meter = pocket.utils.DetectionAPMeter(len(num_gt), nproc=1, num_gt=num_gt.tolist(), algorithm=algorithm)
    meter.append(scored.scores, scored.classes, scored.labels)
    with contextlib.redirect_stdout(io.StringIO()):  # a warning for each class without detections
        ap: Tensor = meter.eval()
    return ap


def _labelled(
    model: Any,
    associate: Callable[..., Tensor],
    detected: dict[str, Tensor],
    target: dict[str, Tensor],
    interactions: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, interaction classes and true-positive labels [M] of one image's detections."""
    detected = to_device(detected, torch.device("cpu"))
    humans, others = detected["boxes"][detected["pairing"]].unbind(0)
    scores, classes = detected["scores"], detected["labels"]
    if model.num_classes == interactions.shape[1]:  # EZ-HOI predicts verbs; otherwise interactions
        classes = interactions[detected["objects"], classes].long()
    gt_humans, gt_others = (model.recover_boxes(target[key], target["size"]) for key in ("boxes_h", "boxes_o"))
    labels = torch.zeros_like(scores)
    for hoi in target["hoi"].unique():
        found, annotated = classes == hoi, target["hoi"] == hoi
        if found.any():
            labels[found] = associate(
                (gt_humans[annotated], gt_others[annotated]), (humans[found], others[found]), scores[found]
            )
    return scores, classes, labels


class _Clock:
    """Add up wall time by name. Waits for the device before and after."""

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
    """The last calls of EZ-HOI's two scoring methods, to repeat them on the same encodings."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.made: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}

    @property
    def pairs(self) -> int:
        """Human-object pairs in the last batch."""
        return sum(len(humans) for humans in self.made["compute_roi_embeddings"][2][2])

    def again(self) -> Detections:
        """Compute features, logits and detections again, with what is injected now."""
        args, kwargs, _ = self.made["compute_roi_embeddings"]
        logits, priors, humans, others, objects, *_ = self.model.compute_roi_embeddings(*args, **kwargs)
        (boxes, _, _, _, _, _, *sizes), kwargs, _ = self.made["postprocessing"]
        found: Detections = self.model.postprocessing(boxes, humans, others, logits, priors, objects, *sizes, **kwargs)
        return found


@contextmanager
def _recording(model: Any) -> Iterator[_Calls]:
    """Record the calls of the scoring methods inside the block."""
    calls = _Calls(model)
    names = ("compute_roi_embeddings", "postprocessing")

    def record(name: str) -> Callable[..., Any]:
        original = getattr(model, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            calls.made[name] = (args, kwargs, result)
            return result

        return wrapper

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(replaced(model, name, record(name)))
        yield calls

"""Score any number of bridges on stored features, as EZ-HOI's own evaluation does."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ezhoi_diffusion.defaults import torch_defaults
from ezhoi_diffusion.evaluation.application import bridged
from ezhoi_diffusion.evaluation.average_precision import known_object
from ezhoi_diffusion.evaluation.calibration import object_names
from ezhoi_diffusion.evaluation.comparison import FULL, REFERENCE, Comparison
from ezhoi_diffusion.evaluation.headroom import mean_ap
from ezhoi_diffusion.evaluation.processes import in_processes
from ezhoi_diffusion.evaluation.protocols import EvalProtocol, annotated_objects, hicodet
from ezhoi_diffusion.evaluation.scorecards import Scorecards
from ezhoi_diffusion.evaluation.variants import Variant
from ezhoi_diffusion.features.images import StoredImage, stored_images
from ezhoi_diffusion.features.score import EzHoiScore, LogitCheck, ScoreError
from ezhoi_diffusion.features.store import FeatureStore

# Of several images in one call. Larger batches were not faster on a CPU, and the results of all variants are in memory together.
MAX_PAIRS = 1024
NUM_TIMED = 8  # images on which the cost of a bridge is measured, one at a time, as at eval
# Steps of the progress bar for the bootstrap, per image: at HICO-DET's size it takes this share of the time.
BOOTSTRAP_SHARE = 0.1
# Seconds that the estimate of the time left is based on. It leaves out the first two batches, which start processes and time images.
MEASURED_SECONDS = 5.0
LONG = 60.0  # seconds left; a shorter time is not mentioned


T = TypeVar("T")
Batch = tuple[list[StoredImage], Tensor, Tensor]
"""Some images, their features [P, D] and EZ-HOI's logits [P, C]."""


@torch_defaults()
def replay(
    store: FeatureStore,
    variants: Mapping[str, Variant],
    *,
    protocol: EvalProtocol | None = None,
    chosen: set[int] | None = None,
    replicates: int = 0,
    measured: bool = False,
    device: torch.device | str = "cpu",
    jobs: int = 1,
) -> Comparison:
    """Make the comparison that `--compare` makes in EZ-HOI, from the features of a split.

    `none` has EZ-HOI's own logits. A bridge is scored by EZ-HOI's formula, to rounding, on what it returns for the [P, D] of an
    image.

    Args:
        store: Features of the split.
        variants: Bridges by name.
        protocol: How to evaluate; `hicodet(store)` by default.
        chosen: Positions of the images to take; all by default.
        replicates: Of the bootstrap over images, 0 for none.
        measured: Also measure alignment, calibration, headroom and the cost of the bridges, and keep a sample of the features. Otherwise
            `added_ms` is that of one image.
        device: Where the bridges get their features.
        jobs: Number of processes that apply bridges, and resample.

    Raises:
        ScoreError: The features cannot be scored, or no image has a pair or an annotation that counts.
        FeatureStoreError: The store is damaged.
        InputWrittenError: A bridge writes into what it gets.
        EzhoiDiffusionError: A bridge depends on other features although it says row_by_row, or cannot be sent to another process.
    """
    score = EzHoiScore.from_store(store)
    protocol = protocol or hicodet(store)
    images = [position for position in range(len(store.images)) if chosen is None or position in chosen]
    num_pairs = sum(store.images[position]["rows"] for position in images)
    if not num_pairs:
        raise ScoreError(
            f"{store.folder}: none of the {len(images)} images has a human-object pair, so nothing can be scored"
        )
    cards = Scorecards(score, protocol, variants, num_pairs, store.text_mean if measured else None)
    per_variant = max(1, round(BOOTSTRAP_SHARE * len(images) / len(cards.by_name))) if replicates else 0
    total = len(images) + per_variant * len(cards.by_name)
    with torch.no_grad(), tqdm(total=total, desc="compare", unit="step", file=sys.stderr) as progress:
        batches = _batches(stored_images(store, chosen), LogitCheck(store, score))
        _collect(cards, batches, variants, NUM_TIMED if measured else 1, device, jobs, progress)
        scored, annotations = cards.scored(), cards.annotations()
        oracles = {} if cards.headroom is None else cards.headroom.scored(scored[REFERENCE])
        part = chosen is not None or protocol.partial or store.meta.get("max_images") is not None
        if not part and len(protocol.uncaptured):
            annotations = torch.cat([annotations, protocol.uncaptured.int()])
        num_gt = annotations.sum(0)
        if protocol.setting == "known-object":
            present, object_of = annotated_objects(store, annotations)
            scored, oracles = (
                {name: known_object(one, present, object_of) for name, one in some.items()}
                for some in (scored, oracles)
            )
        groups = protocol.groups
        if part:
            # of a few images most classes have no annotation, and would only thin the mean
            groups = {name: index[num_gt[index] > 0] for name, index in groups.items() if (num_gt[index] > 0).any()}
        if FULL not in groups:
            raise ScoreError(
                f"{store.folder}: none of these {len(images)} images has an annotation of a class that counts: capture more images"
            )
        headroom = {name: mean_ap(one, num_gt, groups, protocol.algorithm) for name, one in oracles.items()}
        del oracles  # the bootstrap needs their memory
        return Comparison.from_detections(
            scored,
            annotations,
            groups,
            variants,
            added_ms={name: _milliseconds(cards.by_name[name].seconds, store, images) for name in variants},
            alignment={
                name: card.alignment.measures() for name, card in cards.by_name.items() if card.alignment is not None
            },
            samples={name: card.shown for name, card in cards.by_name.items() if card.shown is not None} or None,
            sample_text=score.text if measured else None,
            algorithm=protocol.algorithm,
            replicates=replicates,
            jobs=jobs,
            advance=lambda: progress.update(per_variant),
            pairs=num_pairs,
            names=protocol.names,
            fingerprint=store.fingerprint,
            setting=protocol.setting,
            calibration={name: card.calibration.entries(object_names(store)) for name, card in cards.by_name.items()}
            if measured
            else {},
            headroom=headroom,
        )


def _collect(
    cards: Scorecards,
    batches: Iterable[Batch],
    variants: Mapping[str, Variant],
    num_timed: int,
    device: torch.device | str,
    jobs: int,
    progress: Any,
) -> None:
    """Apply the variants to all images, and fill the cards. num_timed: number of images that are timed alone."""
    sent: deque[Batch] = deque()

    def tasks() -> Iterator[tuple[Any, ...]]:
        timed = num_timed
        for images, features, logits in batches:
            sent.append((images, features, logits))
            yield variants, features, [image.pairs for image in images], timed, device
            timed = 0 if len(features) else timed  # those of the first batch that has some

    can_divide = jobs == 1 and torch.device(device).type == "cpu"
    for after_each in _report_time_left(in_processes(bridged, tasks(), jobs), progress, can_divide):
        images, features, logits = sent.popleft()
        cards.add(images, features, logits, after_each)
        progress.update(len(images))


def _report_time_left(results: Iterable[T], progress: Any, can_divide: bool) -> Iterator[T]:
    """Yield the results, and write once how much time is left if it is long. can_divide: whether --jobs would shorten it."""
    begin = None
    for number, result in enumerate(results):
        yield result
        done, elapsed = progress.n, progress.format_dict["elapsed"]
        if number == 1:
            begin = done, elapsed
        elif begin is not None and elapsed - begin[1] >= MEASURED_SECONDS:
            left = (elapsed - begin[1]) / (done - begin[0]) * (progress.total - done)
            if left > LONG:
                advice = "; --jobs N divides the images among processes" if can_divide else ""
                progress.write(f"compare: about {left / 60:.1f} minutes more{advice}", file=sys.stderr)
            begin = None


def _batches(images: Iterable[StoredImage], check: LogitCheck) -> Iterator[Batch]:
    """Yield some images at a time. Their logits are checked first, so that another score is refused before any work."""
    waiting: list[StoredImage] = []
    num_pairs = 0
    for image in images:
        if waiting and num_pairs + len(image.pairs) > MAX_PAIRS:
            yield _batch(waiting, check)
            waiting, num_pairs = [], 0
        waiting.append(image)
        num_pairs += len(image.pairs)
    if waiting:
        yield _batch(waiting, check)


def _batch(images: list[StoredImage], check: LogitCheck) -> Batch:
    features, logits = (
        torch.cat([image.adapter_feat for image in images]),
        torch.cat([image.logits for image in images]),
    )
    check.add(features, logits)
    return images, features, logits


def _milliseconds(seconds: list[float], store: FeatureStore, images: list[int]) -> float:
    """Mean time that a bridge adds to an image. An image without pairs costs nothing."""
    with_pairs: float = sum(store.images[position]["rows"] > 0 for position in images) / len(images)
    return 1000.0 * with_pairs * sum(seconds) / len(seconds)

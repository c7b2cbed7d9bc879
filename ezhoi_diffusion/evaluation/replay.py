"""Score any number of bridges on stored features, as EZ-HOI's own evaluation does."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ezhoi_diffusion.defaults import torch_defaults
from ezhoi_diffusion.evaluation.alignment import Alignment
from ezhoi_diffusion.evaluation.application import bridged
from ezhoi_diffusion.evaluation.average_precision import Scored, known_object
from ezhoi_diffusion.evaluation.calibration import ObjectCalibration, object_names
from ezhoi_diffusion.evaluation.comparison import FULL, REFERENCE, Comparison
from ezhoi_diffusion.evaluation.headroom import Headroom, mean_ap
from ezhoi_diffusion.evaluation.processes import in_processes
from ezhoi_diffusion.evaluation.protocols import Detections, EvalProtocol, annotated_objects, hicodet
from ezhoi_diffusion.evaluation.variants import Variant
from ezhoi_diffusion.features.images import StoredImage, stored_images
from ezhoi_diffusion.features.score import EzHoiScore, LogitCheck, ScoreError
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.rng import generator

# In one call, if a bridge takes many images. More were no faster on a processor, and the results of all variants are held together.
MAX_PAIRS = 1024
NUM_TIMED = 8  # images on which the cost of a bridge is measured, one at a time, as at eval
NUM_SHOWN = 500  # pairs in the pictures
# Steps of the progress bar for the bootstrap, per image: at HICO-DET's size it takes this share of the time.
BOOTSTRAP_SHARE = 0.1
SOON = 5.0  # seconds after the second batch, when the time left is known: the first ones also start processes and time single images
LONG = 60.0  # seconds left that are worth a line


T = TypeVar("T")


class _Column:
    """A tensor [M] that grows. Many small ones, kept between large ones that go, would keep the memory of both.

    Args:
        dtype: Of the values.
        room: Number of values that fit without a copy, which would leave memory behind. Room that is not filled takes none.
    """

    def __init__(self, dtype: torch.dtype, room: int) -> None:
        self._buffer, self._size = torch.empty(room, dtype=dtype), 0

    def extend(self, values: Tensor) -> None:
        """Append values [n]."""
        end = self._size + len(values)
        if end > len(self._buffer):
            larger = self._buffer.new_empty(max(end, 2 * len(self._buffer)))
            larger[: self._size] = self.tensor
            self._buffer = larger
        self._buffer[self._size : end] = values
        self._size = end

    @property
    def tensor(self) -> Tensor:
        """All values so far, not copied."""
        return self._buffer[: self._size]


@dataclass(eq=False)
class _Scorecard:
    """Results that one variant has collected so far."""

    scores: _Column
    labels: _Column
    alignment: Alignment | None
    calibration: ObjectCalibration = field(default_factory=ObjectCalibration)
    shown: Tensor | None = None  # [R, D]
    seconds: list[float] = field(default_factory=list)


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
    text_mean = store.text_mean if measured else None
    room = _room(score, num_pairs)
    cards = {
        name: _Scorecard(
            _Column(torch.float32, room),
            _Column(torch.bool, room),
            Alignment(score.text, score.class_text, text_mean, pairs=num_pairs) if text_mean is not None else None,
        )
        for name in (REFERENCE, *variants)
    }
    perfect = Headroom() if measured else None
    per_variant = max(1, round(BOOTSTRAP_SHARE * len(images) / len(cards))) if replicates else 0
    total = len(images) + per_variant * len(cards)
    with torch.no_grad(), tqdm(total=total, desc="compare", unit="step", file=sys.stderr) as progress:
        stored = stored_images(store, chosen)
        scored, annotations = _collect(
            protocol,
            score,
            LogitCheck(store, score),
            stored,
            variants,
            cards,
            num_pairs,
            NUM_TIMED if measured else 1,
            device,
            jobs,
            progress,
            perfect,
        )
        oracles = {} if perfect is None else perfect.scored(scored[REFERENCE])
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
            added_ms={name: _milliseconds(cards[name].seconds, store, images) for name in variants},
            alignment={name: card.alignment.measures() for name, card in cards.items() if card.alignment is not None},
            samples={name: card.shown for name, card in cards.items() if card.shown is not None} or None,
            sample_text=score.text if measured else None,
            algorithm=protocol.algorithm,
            replicates=replicates,
            jobs=jobs,
            advance=lambda: progress.update(per_variant),
            pairs=num_pairs,
            names=protocol.names,
            fingerprint=store.fingerprint,
            setting=protocol.setting,
            calibration={name: card.calibration.entries(object_names(store)) for name, card in cards.items()}
            if measured
            else {},
            headroom=headroom,
        )


def _collect(
    protocol: EvalProtocol,
    score: EzHoiScore,
    check: LogitCheck,
    images: Iterable[StoredImage],
    variants: Mapping[str, Variant],
    cards: dict[str, _Scorecard],
    num_pairs: int,
    singly: int,
    device: torch.device | str,
    jobs: int,
    progress: Any,
    perfect: Headroom | None,
) -> tuple[dict[str, Scored], Tensor]:
    """Detections of every variant, and annotations of each image and class [I, K] int32. Fills the cards and `perfect`."""
    shown = torch.randperm(num_pairs, generator=generator(0, "shown"))[:NUM_SHOWN].sort().values
    room = _room(score, num_pairs)
    classes, where = _Column(torch.int64, room), _Column(torch.int64, room)
    annotations = _Column(torch.int32, 0)
    seen = number = 0
    batches: deque[tuple[list[StoredImage], Tensor, Tensor]] = deque()

    def tasks() -> Iterator[tuple[Any, ...]]:
        timed = singly
        for batch in _batches(images):
            features = torch.cat([image.adapter_feat for image in batch])
            logits = torch.cat([image.logits for image in batch])
            check.add(features, logits)
            batches.append((batch, features, logits))
            yield variants, features, [image.pairs for image in batch], timed, device
            timed = 0 if len(features) else timed  # those of the first batch that has some

    can_divide = jobs == 1 and torch.device(device).type == "cpu"
    for after_each in _report_time_left(in_processes(bridged, tasks(), jobs), progress, can_divide):
        batch, features, ezhoi_logits = batches.popleft()
        detections = Detections.from_images(batch, protocol.match)
        classes.extend(detections.classes)
        where.extend(detections.image + number)
        annotations.extend(torch.cat([protocol.count(image) for image in batch]))
        number += len(batch)
        labels = torch.cat([image.labels for image in batch])
        of_pair = torch.cat([image.pairs.objects for image in batch])
        possible, objects = score.object_to_target[of_pair], of_pair[detections.row]
        right = torch.zeros(len(detections.row), dtype=torch.bool)
        right[detections.candidate] = True
        here = shown[(shown >= seen) & (shown < seen + len(features))] - seen
        at = int((shown < seen).sum())
        seen += len(features)
        for name, card in cards.items():
            own, seconds = after_each.get(name, (None, []))
            card.seconds += seconds
            if own is None or torch.equal(own, features):
                after, logits = features, ezhoi_logits
            else:
                after, logits = own, score.class_logits(own)
            scores = detections.scores(logits)
            card.scores.extend(scores)
            card.labels.extend(detections.labels(scores))
            if card.alignment is not None:
                card.alignment.add(after, logits, labels, possible)
                card.calibration.add(objects, logits[detections.row, detections.target].sigmoid(), right)
                if card.shown is None:
                    card.shown = after.new_empty(len(shown), after.shape[1])
                card.shown[at : at + len(here)] = after[here]
        if perfect is not None:
            perfect.add(detections, ezhoi_logits)
        progress.update(len(batch))
    # the variants share classes and images, so that each adds five bytes for a detection
    found, image = classes.tensor, where.tensor
    scored = {name: Scored(card.scores.tensor, found, card.labels.tensor, image) for name, card in cards.items()}
    return scored, annotations.tensor.view(number, -1)


def _room(score: EzHoiScore, num_pairs: int) -> int:
    """The largest number of detections of HICO-DET's protocol: every pair has the object with the most targets."""
    return num_pairs * int(score.object_to_target.sum(1).max())


def _report_time_left(results: Iterable[T], progress: Any, can_divide: bool) -> Iterator[T]:
    """Yield the results, and write once what time is left, if it is long. can_divide: --jobs would make it shorter."""
    begin = None
    for number, result in enumerate(results):
        yield result
        done, elapsed = progress.n, progress.format_dict["elapsed"]
        if number == 1:
            begin = done, elapsed
        elif begin is not None and elapsed - begin[1] >= SOON:
            left = (elapsed - begin[1]) / (done - begin[0]) * (progress.total - done)
            if left > LONG:
                advice = "; --jobs N divides the images among processes" if can_divide else ""
                progress.write(f"compare: about {left / 60:.1f} minutes more{advice}", file=sys.stderr)
            begin = None


def _batches(images: Iterable[StoredImage]) -> Iterator[list[StoredImage]]:
    batch: list[StoredImage] = []
    num_pairs = 0
    for image in images:
        if batch and num_pairs + len(image.pairs) > MAX_PAIRS:
            yield batch
            batch, num_pairs = [], 0
        batch.append(image)
        num_pairs += len(image.pairs)
    if batch:
        yield batch


def _milliseconds(seconds: list[float], store: FeatureStore, images: list[int]) -> float:
    """Mean time that a bridge adds to an image. An image without pairs costs nothing."""
    with_pairs: float = sum(store.images[position]["rows"] > 0 for position in images) / len(images)
    return 1000.0 * with_pairs * sum(seconds) / len(seconds)

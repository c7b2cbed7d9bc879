"""What the variants of a comparison collect, some images at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ezhoi_diffusion.evaluation.alignment import Alignment
from ezhoi_diffusion.evaluation.average_precision import Column, Scored
from ezhoi_diffusion.evaluation.calibration import ObjectCalibration
from ezhoi_diffusion.evaluation.comparison import REFERENCE
from ezhoi_diffusion.evaluation.headroom import Headroom
from ezhoi_diffusion.evaluation.protocols import Detections, EvalProtocol
from ezhoi_diffusion.features.images import StoredImage
from ezhoi_diffusion.features.score import EzHoiScore
from ezhoi_diffusion.rng import generator

NUM_SHOWN = 500  # pairs in the pictures


@dataclass(eq=False)
class Scorecard:
    """What one variant has collected so far.

    Attributes:
        scores: Of its M detections, float32.
        labels: Which of them are true positives, bool.
        alignment: Its measures; None where nothing is measured.
        calibration: Its calibration, where something is measured.
        shown: Its features [R, D] of the pairs in the pictures; None where nothing is measured.
        seconds: What single images took.
    """

    scores: Column
    labels: Column
    alignment: Alignment | None
    calibration: ObjectCalibration = field(default_factory=ObjectCalibration)
    shown: Tensor | None = None
    seconds: list[float] = field(default_factory=list)


class Scorecards:
    """What all variants have collected so far.

    Args:
        score: EZ-HOI's score.
        protocol: How the images are evaluated.
        variants: Names of the variants but `none`.
        pairs: Number of pairs that will come.
        text_mean: Mean of the unit text features [D], for alignment. Without it only detections are collected.

    Attributes:
        by_name: Variant -> its scorecard; the first is `none`.
        headroom: That of `none`; None where nothing is measured.
    """

    def __init__(
        self, score: EzHoiScore, protocol: EvalProtocol, variants: Iterable[str], pairs: int, text_mean: Tensor | None
    ) -> None:
        self._score, self._protocol = score, protocol
        # in HICO-DET's protocol at most: every pair has the object with the most targets
        room = pairs * int(score.object_to_target.sum(1).max())
        self.by_name = {
            name: Scorecard(
                Column(torch.float32, room),
                Column(torch.bool, room),
                Alignment(score.text, score.class_text, text_mean, pairs=pairs) if text_mean is not None else None,
            )
            for name in (REFERENCE, *variants)
        }
        self.headroom = Headroom(room) if text_mean is not None else None
        self._classes, self._image = Column(torch.int64, room), Column(torch.int64, room)
        self._annotations = Column(torch.int32)
        self._shown = torch.randperm(pairs, generator=generator(0, "shown"))[:NUM_SHOWN].sort().values
        self._pairs = self._images = 0

    def add(
        self,
        images: Sequence[StoredImage],
        features: Tensor,
        ezhoi_logits: Tensor,
        bridged: Mapping[str, tuple[Tensor | None, list[float]]],
    ) -> None:
        """Add the next images.

        Args:
            images: At least one.
            features: Their features [P, D].
            ezhoi_logits: Their logits in EZ-HOI [P, C].
            bridged: Variant -> features [P, D], None where it changes nothing, and the seconds that single images took.
        """
        detections = Detections.from_images(images, self._protocol.match)
        self._classes.extend(detections.classes)
        self._image.extend(detections.image + self._images)
        self._annotations.extend(torch.cat([self._protocol.count(image) for image in images]))
        labels = torch.cat([image.labels for image in images])
        of_pair = torch.cat([image.pairs.objects for image in images])
        possible, objects = self._score.object_to_target[of_pair], of_pair[detections.row]
        right = torch.zeros(len(detections.row), dtype=torch.bool)
        right[detections.candidate] = True
        begin, end = torch.searchsorted(self._shown, torch.tensor([self._pairs, self._pairs + len(features)])).tolist()
        here = self._shown[begin:end] - self._pairs
        for name, card in self.by_name.items():
            own, seconds = bridged.get(name, (None, []))
            card.seconds += seconds
            if own is None or torch.equal(own, features):
                after, logits = features, ezhoi_logits
            else:
                after, logits = own, self._score.class_logits(own)
            scores = detections.scores(logits)
            card.scores.extend(scores)
            card.labels.extend(detections.labels(scores))
            if card.alignment is not None:
                card.alignment.add(after, logits, labels, possible)
                card.calibration.add(objects, logits[detections.row, detections.target].sigmoid(), right)
                if card.shown is None:
                    card.shown = after.new_empty(len(self._shown), after.shape[1])
                card.shown[begin:end] = after[here]
        if self.headroom is not None:
            self.headroom.add(detections, ezhoi_logits)
        self._pairs, self._images = self._pairs + len(features), self._images + len(images)

    def scored(self) -> dict[str, Scored]:
        """The detections of every variant. They share classes and images, so that each adds five bytes for a detection."""
        classes, image = self._classes.tensor, self._image.tensor
        return {
            name: Scored(card.scores.tensor, classes, card.labels.tensor, image) for name, card in self.by_name.items()
        }

    def annotations(self) -> Tensor:
        """Annotated pairs of each image and class, [I, K] int32."""
        return self._annotations.tensor.view(self._images, -1)

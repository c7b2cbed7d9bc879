"""Pairs and features of one image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Human-object pairs of one image, as EZ-HOI formed them: B boxes, P pairs.

    Boxes are xyxy in pixels of EZ-HOI's CLIP input, humans first, in the order of the detections.
    """

    image: str | None  # file name; None where EZ-HOI received no targets
    batch_index: int  # position of the image in EZ-HOI's batch
    size: Tensor  # [2] height, width of the CLIP input
    boxes: Tensor  # [B, 4]
    scores: Tensor  # [B] of the detector
    classes: Tensor  # [B] int64, object classes
    pairing: Tensor  # [2, P] int64, rows of `boxes`: human, object

    @property
    def objects(self) -> Tensor:
        """[P] int64, the object class of each pair."""
        return self.classes[self.pairing[1]]

    def __len__(self) -> int:
        return self.pairing.shape[1]


@dataclass(frozen=True)
class FeatureBatch:
    """Captured features of one image in a pass over a split; P may be zero.

    All tensors are detached and on EZ-HOI's device. Copy what you keep.
    """

    index: int  # position of the image in the split
    pairs: Pairs
    adapter_feat: Tensor  # [P, D] float32, exactly what EZ-HOI multiplies with the text features
    text: Tensor | None  # [N_sel, D] the text features; None where EZ-HOI formed no pair
    logits: Tensor  # [P, num_classes] float32, EZ-HOI's logits, before sigmoid and detector scores
    labels: Tensor  # [P, num_classes] bool, annotations matched at EZ-HOI's IoU threshold
    gt_boxes: Tensor  # [2, G, 4] annotated human and object boxes, xyxy, same pixels as `pairs.boxes`
    gt_hoi: Tensor  # [G] int64, annotated interaction classes; actions for V-COCO

    @property
    def image(self) -> str | None:
        """File name of the image."""
        return self.pairs.image

"""EZ-HOI's published score, computed from a feature store without EZ-HOI, weights or images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.store import FeatureStore

NEEDED = ("text", "label", "sample_lens", "logit_scale", "hyper_lambda", "object_to_target")
TOLERANCE = 1e-4  # of the largest logit: room for another BLAS or device; another formula differs by far more


class ScoreError(EzhoiDiffusionError):
    """EZ-HOI's scores cannot be computed from the store."""


@dataclass(frozen=True, eq=False)
class EzHoiScore:
    """Constants of EZ-HOI's score: N_sel texts, C target classes (verbs), O object classes.

    Attributes:
        text: [N_sel, D].
        label: [N_sel, C].
        sample_lens: [C].
        logit_scale: [].
        hyper_lambda: [].
        object_to_target: [O, C] bool.
    """

    text: Tensor
    label: Tensor
    sample_lens: Tensor
    logit_scale: Tensor
    hyper_lambda: Tensor
    object_to_target: Tensor

    @classmethod
    def from_store(cls, store: FeatureStore) -> EzHoiScore:
        """Read the constants. Raises ScoreError where the store lacks one."""
        missing = [name for name in NEEDED if name not in store.ezhoi]
        if missing:
            raise ScoreError(
                f"{store.folder} lacks {', '.join(missing)}, which EZ-HOI's score needs. Imported features and runs with --use_weight_pred "
                f"cannot be scored offline: compare in EZ-HOI, with `ezhoi-diffusion run main_tip_finetune.py … --eval --compare`"
            )
        return cls(**{name: store.ezhoi[name] for name in NEEDED})

    def of_texts(self, kept: Tensor) -> EzHoiScore:
        """The score with some of the texts only, [N_sel] bool. The logit of a class without text is 0, as EZ-HOI trains it."""
        if kept.all():
            return self
        label = self.label[kept]
        return replace(self, text=self.text[kept], label=label, sample_lens=label.sum(0).clamp_min(1))

    @cached_property
    def class_text(self) -> Tensor:
        """[C, D], the vector that gives each target class its logit: the mean of its texts, labelᵀ·T / sample_lens."""
        return self.label.T @ self.text / self.sample_lens.unsqueeze(1)

    def logits(self, x: Tensor) -> Tensor:
        """Logits [P, C] of features x [P, D]: ½·logit_scale·((x·Tᵀ)·label / sample_lens), without normalization."""
        return x @ self.text.T @ self.label / self.sample_lens / 2 * self.logit_scale

    def class_logits(self, x: Tensor) -> Tensor:
        """The same logits [P, C] to rounding: x [P, D] times the texts of C classes, a sixth of the work of N_sel texts and labels."""
        return x @ self.class_text.T * (self.logit_scale / 2)

    @cached_property
    def matrix(self) -> Tensor:
        """[C, D] float64, the W of the logits x·Wᵀ: the class texts times half the logit scale."""
        class_text = self.label.double().T @ self.text.double() / self.sample_lens.double().unsqueeze(1)
        return class_text * self.logit_scale.double() / 2

    @cached_property
    def inverse(self) -> Tensor:
        """[D, C] float64, the pseudo-inverse of W. Raises ScoreError where W has not full row rank."""
        u, s, vh = torch.linalg.svd(self.matrix, full_matrices=False)
        classes, dim = self.matrix.shape
        rank = int((s > max(classes, dim) * torch.finfo(torch.float32).eps * s[0]).sum())  # the texts are float32
        if rank < classes:
            raise ScoreError(
                f"the logits of {classes} classes cannot be set one by one: their texts have {dim} dimensions and rank {rank} "
                f"(condition {float(s[0] / s[-1].clamp_min(1e-300)):.3g}). Use a bridge that does not set logits"
            )
        inverse: Tensor = vh.T / s @ u.T
        return inverse

    def feature(self, x: Tensor, logits: Tensor) -> Tensor:
        """The nearest features [P, D] to x [P, D] that have these logits [P, C]: x + (logits − x·Wᵀ)·pinv(W)ᵀ.

        It is computed in float64 and returned in the dtype of x. `relative_change` tells how far it is from x.

        Raises:
            ScoreError: W has not full row rank, so not all logits can be had.
        """
        moved = x.double() + (logits.double() - x.double() @ self.matrix.T) @ self.inverse.T
        return moved.to(x.dtype)

    def prior(self, human: Tensor, other: Tensor, objects: Tensor) -> Tensor:
        """Prior [P, C] from detector scores [P] and object classes [P]: (s_h·s_o)^p where the object has the verb, else 0."""
        together = human.pow(self.hyper_lambda) * other.pow(self.hyper_lambda)
        return together.unsqueeze(1) * self.object_to_target[objects.long()]


def relative_change(x: Tensor, moved: Tensor) -> Tensor:
    """[P], the size of the change from features x [P, D] to `moved` as a share of the norm of x."""
    change: Tensor = (moved - x).norm(dim=1) / x.norm(dim=1).clamp_min(1e-12)
    return change


class LogitCheck:
    """Compares EZ-HOI's stored logits with logits computed from the stored features, which come in pieces.

    A difference is measured by the largest stored logit so far, so that the first piece shows another score.

    Attributes:
        worst: The largest difference so far.
        largest: The largest stored logit so far.
    """

    def __init__(self, store: FeatureStore, score: EzHoiScore) -> None:
        self.worst, self.largest = 0.0, 1e-12
        self._folder, self._score = store.folder, score

    def add(self, features: Tensor, logits: Tensor) -> None:
        """Compare the logits [n, C] of the next n features [n, D]; n may be 0.

        Raises:
            ScoreError: The difference is more than rounding: the run has another score than the published one.
        """
        if not len(logits):
            return
        difference = float((self._score.class_logits(features) - logits).abs().max())
        self.worst = max(difference, self.worst)  # in this order NaN stays NaN
        self.largest = max(self.largest, float(logits.abs().max()))
        if not self.worst <= TOLERANCE * self.largest:
            raise ScoreError(
                f"{self._folder}: EZ-HOI's published score differs from the captured logits by {self.worst:.3g} "
                f"(logits reach {self.largest:.3g}): this run scores differently. Compare in EZ-HOI: `ezhoi-diffusion run "
                f"main_tip_finetune.py … --eval --compare`"
            )


def require_replayable(store: FeatureStore, score: EzHoiScore) -> float:
    """Make a `LogitCheck` of a whole store. Returns the largest difference, as a share of the largest logit."""
    check = LogitCheck(store, score)
    for shard in store.shards():
        check.add(shard["adapter_feat"], shard["logits"])
    return check.worst / check.largest


def interaction_classes(store: FeatureStore, objects: Tensor, targets: Tensor) -> Tensor:
    """Interaction classes [M] of object classes [M] and verbs [M]. Where EZ-HOI predicts interactions, `targets` as they are."""
    table = store.ezhoi["object_n_verb_to_interaction"]
    if store.ezhoi["label"].shape[1] != table.shape[1]:
        return targets
    return table[objects.long(), targets]


def targets_of(store: FeatureStore) -> Tensor:
    """[K] int64, the target class of each interaction: its verb, or itself where EZ-HOI predicts interactions."""
    table = store.ezhoi["object_n_verb_to_interaction"]
    objects, verbs = (table >= 0).nonzero().unbind(1)
    # V-COCO has actions without object, which the table lacks
    targets = torch.arange(max(int(table.max()) + 1, len(store.ezhoi["classes/full"])))
    if store.ezhoi["label"].shape[1] == table.shape[1]:
        targets[table[objects, verbs]] = verbs
    return targets


def names_of_interactions(store: FeatureStore) -> list[str] | None:
    """One name for each interaction class, where EZ-HOI gave them."""
    names = store.meta.get("interactions")
    return [str(name) for name in names] if isinstance(names, list) else None

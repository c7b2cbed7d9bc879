"""The published EZ-HOI's score, from what a capture stored: no host, no weights, no images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.store import FeatureStore

NEEDED = ("text", "label", "sample_lens", "logit_scale", "hyper_lambda", "object_to_target")
TOLERANCE = 1e-4  # of the largest logit: other BLAS, other device; a different formula is off by far more


class ScoreError(EzhoiDiffusionError):
    """The host's scores cannot be had from what was stored."""


@dataclass(frozen=True, eq=False)
class EzHoiScore:
    """The constants of the host's score: N_sel texts, C target classes (verbs), O object classes.

    text [N_sel, D], label [N_sel, C], sample_lens [C], logit_scale [], hyper_lambda [], object_to_target [O, C] bool.
    """

    text: Tensor
    label: Tensor
    sample_lens: Tensor
    logit_scale: Tensor
    hyper_lambda: Tensor
    object_to_target: Tensor

    @classmethod
    def from_store(cls, store: FeatureStore) -> EzHoiScore:
        """Raises ScoreError where the store lacks one of them."""
        missing = [name for name in NEEDED if name not in store.ezhoi]
        if missing:
            raise ScoreError(
                f"{store.folder} lacks {', '.join(missing)}, which the host's score needs. A host that predicts the "
                f"logits' scale (--use_weight_pred) and features that were imported cannot be scored without the host: "
                f"compare there, with `ezhoi-diffusion run main_tip_finetune.py … --eval --compare`"
            )
        return cls(**{name: store.ezhoi[name] for name in NEEDED})

    @cached_property
    def class_text(self) -> Tensor:
        """[C, D], for each target class what its logit is a product with: the mean of its texts, labelᵀ·T / sample_lens."""
        return self.label.T @ self.text / self.sample_lens.unsqueeze(1)

    def logits(self, x: Tensor) -> Tensor:
        """[P, C] of features x [P, D]: ½·logit_scale·((x·Tᵀ)·label / sample_lens), nothing normalised."""
        return x @ self.text.T @ self.label / self.sample_lens / 2 * self.logit_scale

    def prior(self, human: Tensor, other: Tensor, objects: Tensor) -> Tensor:
        """[P, C] of detector scores [P] and object classes [P]: (s_h·s_o)^p where the object has such a verb, else 0."""
        together = human.pow(self.hyper_lambda) * other.pow(self.hyper_lambda)
        return together.unsqueeze(1) * self.object_to_target[objects.long()]


def require_replayable(store: FeatureStore, score: EzHoiScore) -> float:
    """The largest difference between stored logits of the host and those made anew, as a share of the largest logit.

    Raises ScoreError where it is no rounding: the host then has another score than the published one.
    """
    worst, largest = 0.0, 1e-12
    for shard in store.shards():
        if len(shard["logits"]):
            worst = max(worst, float((score.logits(shard["adapter_feat"]) - shard["logits"]).abs().max()))
            largest = max(largest, float(shard["logits"].abs().max()))
    if not worst <= TOLERANCE * largest:
        raise ScoreError(
            f"{store.folder}: the published score, made anew from the stored features, differs from the host's by {worst:.3g} "
            f"(logits reach {largest:.3g}): this host scores in another way. Compare with the host itself: `ezhoi-diffusion run "
            f"main_tip_finetune.py … --eval --compare`"
        )
    return worst / largest


def interaction_classes(store: FeatureStore, objects: Tensor, targets: Tensor) -> Tensor:
    """[M] int64 interaction class of (object class [M], verb [M]); the verbs themselves where the host predicts those."""
    table = store.ezhoi["object_n_verb_to_interaction"]
    if store.ezhoi["label"].shape[1] != table.shape[1]:
        return targets
    return table[objects.long(), targets]


def targets_of(store: FeatureStore) -> Tensor:
    """[K] int64 target class of each interaction class: its verb, or itself where the host predicts interactions."""
    table = store.ezhoi["object_n_verb_to_interaction"]
    objects, verbs = (table >= 0).nonzero().unbind(1)
    targets = torch.arange(int(table.max()) + 1)
    if store.ezhoi["label"].shape[1] == table.shape[1]:
        targets[table[objects, verbs]] = verbs
    return targets


def names_of_interactions(store: FeatureStore) -> list[str] | None:
    """One name for each interaction class, where the host knew them."""
    names = store.meta.get("interactions")
    return [str(name) for name in names] if isinstance(names, list) else None

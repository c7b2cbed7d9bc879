"""The effect of a bridge on single pairs: similarity to the texts, norms, the top class, and accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ezhoi_diffusion.defaults import torch_defaults
from ezhoi_diffusion.evaluation.alignment import NO_BETTER, NOTICEABLE, top_target
from ezhoi_diffusion.evaluation.comparison import REFERENCE, Comparison
from ezhoi_diffusion.evaluation.protocols import Detections, hicodet
from ezhoi_diffusion.features.batch import Pairs
from ezhoi_diffusion.features.images import stored_images
from ezhoi_diffusion.features.score import EzHoiScore, ScoreError, names_of_interactions
from ezhoi_diffusion.features.store import FeatureStore

MIN_CHANGE = 0.5  # points of mAP; another --seed of the demo alone moved mAP by about 3


@dataclass(frozen=True, eq=False)
class Effect:
    """P pairs of some images before and after a bridge.

    Attributes:
        before: adapter_feat [P, D].
        after: The bridged adapter_feat [P, D].
        text: Text features [N_sel, D] as EZ-HOI multiplies with them.
        logits_before: EZ-HOI's logits [P, C].
        logits_after: EZ-HOI's logits [P, C] of the bridged features.
        possible: Targets that the pair's object class admits, [P, C] bool.
        labels: Annotations matched by IoU, [P, C] bool.
        predictions: One entry for each image: its best interactions before and after, as JSON.
    """

    before: Tensor
    after: Tensor
    text: Tensor
    logits_before: Tensor
    logits_after: Tensor
    possible: Tensor
    labels: Tensor
    predictions: list[dict[str, Any]] = field(default_factory=list)

    def similarity(self) -> tuple[Tensor, Tensor]:
        """Cosine [P] to the nearest text, before and after."""
        text = F.normalize(self.text, dim=-1)
        before, after = ((F.normalize(x, dim=-1) @ text.T).amax(1) for x in (self.before, self.after))
        return before, after

    def norms(self) -> tuple[Tensor, Tensor]:
        """Norms [P], before and after."""
        return self.before.norm(dim=1), self.after.norm(dim=1)

    def top(self) -> tuple[Tensor, Tensor]:
        """The possible target [P] with the highest logit, before and after."""
        return top_target(self.logits_before, self.possible), top_target(self.logits_after, self.possible)

    def outcome(self) -> dict[str, int]:
        """Count pairs whose top target is unchanged, changed, changed to or from an annotated one, or changed otherwise."""
        before, after = self.top()
        known = self.labels.any(1)
        right_before, right_after = (self.labels.gather(1, t.unsqueeze(1)).squeeze(1) for t in (before, after))
        changed = before != after
        return {
            "unchanged": int((~changed).sum()),
            "changed": int(changed.sum()),
            "to right": int((changed & known & ~right_before & right_after).sum()),
            "to wrong": int((changed & known & right_before & ~right_after).sum()),
            "other": int((changed & ~(known & (right_before ^ right_after))).sum()),
        }

    def accuracy(self) -> tuple[float, float] | None:
        """Share of annotated pairs whose top target is annotated, before and after; None where no pair is annotated."""
        known = self.labels.any(1)
        if not known.any():
            return None
        before, after = (self.labels[known].gather(1, t[known].unsqueeze(1)).double().mean() for t in self.top())
        return float(before), float(after)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: means and quartiles, counts, predictions."""
        similarity, norms = self.similarity(), self.norms()
        accuracy = self.accuracy()
        return {
            "pairs": len(self.before),
            "annotated_pairs": int(self.labels.any(1).sum()),
            "similarity": {"before": _spread(similarity[0]), "after": _spread(similarity[1])},
            "norm": {"before": _spread(norms[0]), "after": _spread(norms[1])},
            "moved_cosine": _spread((F.normalize(self.before, dim=-1) * F.normalize(self.after, dim=-1)).sum(1)),
            "top1": self.outcome(),
            "accuracy": None if accuracy is None else {"before": accuracy[0], "after": accuracy[1]},
            "predictions": self.predictions,
        }


def _spread(values: Tensor) -> dict[str, float]:
    low, middle, high = values.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"mean": float(values.double().mean()), "quartile1": low, "median": middle, "quartile3": high}


def verdict(effect: Effect, comparison: Comparison, bridge: str) -> str:
    """Describe an effect in words, with a warning where similarity and mAP disagree.

    Args:
        effect: Of the bridge.
        comparison: Of the same images.
        bridge: The variant's name.
    """
    before, after = (float(x.mean()) for x in effect.similarity())
    lines = [
        f"Cosine to the nearest text: {before:.3f} -> {after:.3f}. Top class changed for {effect.outcome()['changed']} of "
        f"{len(effect.before)} pairs."
    ]
    ratio = float((effect.norms()[1] / effect.norms()[0].clamp_min(1e-12)).median())
    if not 0.5 <= ratio <= 2:
        lines.append(
            f"WARNING: norms changed by a factor of {ratio:.3g} (median). EZ-HOI's score is a plain dot product, so it grows with "
            f"the norm. Use output mode keep_norm."
        )
    accuracy = effect.accuracy()
    if accuracy is None:
        lines.append("No pair of these images is annotated, so accuracy is unknown.")
    else:
        known = int(effect.labels.any(1).sum())
        lines.append(
            f"Of {known} annotated pairs the top class was right for {accuracy[0]:.1%} before, {accuracy[1]:.1%} after."
        )
    change = comparison.difference(bridge, "full")
    lines.append(
        f"mAP on these {comparison.images} images: {comparison.mean_ap(REFERENCE, 'full'):.2f} -> "
        f"{comparison.mean_ap(bridge, 'full'):.2f} ({change:+.2f})."
    )
    if after > before + NOTICEABLE and change <= 0:
        lines.append(
            f"WARNING: similarity rose and mAP did not. {NO_BETTER}, on the whole split, beside the baselines identity and "
            f"mean_shift."
        )
    elif abs(change) < MIN_CHANGE:
        lines.append("A change this small may be chance.")
    lines.append(
        "A few images cannot show a gain. `ezhoi-diffusion compare` scores the whole split, beside the baselines."
    )
    return "\n".join(lines)


@torch_defaults()
def effect_of(
    store: FeatureStore,
    bridge: Callable[[Tensor, Pairs], Tensor],
    chosen: set[int],
    top: int,
    device: torch.device | str = "cpu",
) -> Effect:
    """Measure what `bridge` does to the pairs of some images.

    Args:
        store: Features of the split.
        bridge: Maps the features [P, D] and pairs of an image to new features.
        chosen: Positions of the images.
        top: Best interactions to keep for each image.
        device: Where the bridge gets its features.

    Raises:
        ScoreError: The features cannot be scored, or none of the images has a pair.
    """
    score = EzHoiScore.from_store(store)
    match = hicodet(store).match
    names = names_of_interactions(store)
    columns: dict[str, list[Tensor]] = {}
    predictions = []
    with torch.no_grad():
        for image in stored_images(store, chosen):
            if len(image.pairs) == 0:
                continue
            bridged = bridge(image.adapter_feat.to(device), image.pairs)
            after = image.adapter_feat if bridged is None else bridged.cpu()
            values = {
                "before": image.adapter_feat,
                "after": after,
                "logits_before": image.logits,
                "logits_after": score.logits(after),
                "possible": score.object_to_target[image.pairs.objects],
                "labels": image.labels,
            }
            for key, value in values.items():
                columns.setdefault(key, []).append(value)
            detections = Detections.from_images([image], match)
            predictions.append(
                {
                    "image": image.name,
                    "annotated": sorted({_named(names, hoi) for hoi in image.gt_hoi.tolist()}),
                    "before": _best(detections, values["logits_before"], names, top),
                    "after": _best(detections, values["logits_after"], names, top),
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
            detections.labels(scores)[best].tolist(),
            strict=True,
        )
    ]


def _named(names: list[str] | None, hoi: int) -> str:
    return names[hoi] if names else f"interaction {hoi}"

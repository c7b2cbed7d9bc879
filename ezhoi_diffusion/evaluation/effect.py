"""What a bridge does to single pairs: similarity to the texts, norms, the top class, the truth where it is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion.evaluation.alignment import NO_BETTER, NOTICEABLE, top_target
from ezhoi_diffusion.evaluation.comparison import REFERENCE, Comparison

CHANCE = 0.5  # points of mAP: another --seed of the demo's host alone moved it by about 3


@dataclass(frozen=True, eq=False)
class Effect:
    """Before and after a bridge, for P pairs of some images, in the host's own space.

    before, after: adapter_feat [P, D]. text: [N_sel, D] as the host multiplies with it. logits_before, logits_after:
    [P, C] of the host's score. possible: [P, C] bool, targets that the pair's object class admits. labels: [P, C] bool,
    annotations matched by IoU. predictions: one entry for each image, its best scored interactions before and after.
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
        """[P] cosine to the nearest text, before and after."""
        text = normalize(self.text)
        return (normalize(self.before) @ text.T).amax(1), (normalize(self.after) @ text.T).amax(1)

    def norms(self) -> tuple[Tensor, Tensor]:
        """[P] norms of the rows, before and after."""
        return self.before.norm(dim=1), self.after.norm(dim=1)

    def top(self) -> tuple[Tensor, Tensor]:
        """[P] the target with the highest logit among the possible ones, before and after."""
        return top_target(self.logits_before, self.possible), top_target(self.logits_after, self.possible)

    def outcome(self) -> dict[str, int]:
        """Pairs by what became of their top target: unchanged, or changed to or from an annotated one."""
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
            "moved_cosine": _spread((normalize(self.before) * normalize(self.after)).sum(1)),
            "top1": self.outcome(),
            "accuracy": None if accuracy is None else {"before": accuracy[0], "after": accuracy[1]},
            "predictions": self.predictions,
        }


def _spread(values: Tensor) -> dict[str, float]:
    low, middle, high = values.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"mean": float(values.double().mean()), "quartile1": low, "median": middle, "quartile3": high}


def verdict(effect: Effect, comparison: Comparison, bridge: str) -> str:
    """What happened, in words: similarity, norms, accuracy and mAP, and a warning where they disagree."""
    before, after = (float(x.mean()) for x in effect.similarity())
    lines = [
        f"Cosine to the nearest text: {before:.3f} -> {after:.3f}. Top class changed for {effect.outcome()['changed']} of "
        f"{len(effect.before)} pairs."
    ]
    ratio = float((effect.norms()[1] / effect.norms()[0].clamp_min(1e-12)).median())
    if not 0.5 <= ratio <= 2:
        lines.append(
            f"WARNING: norms changed by a factor of {ratio:.3g} (median). The host's score is a plain dot product, so every "
            f"score changes with the norm: use output mode keep_norm, which keeps it."
        )
    accuracy = effect.accuracy()
    if accuracy is None:
        lines.append("No pair of these images is annotated, so nothing can be said of the truth.")
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
            f"WARNING: similarity rose and mAP did not. {NO_BETTER}, on the whole split, beside the controls identity and "
            f"mean_shift."
        )
    elif abs(change) < CHANCE:
        lines.append("That change is too small to be told from chance.")
    lines.append(
        "A few images cannot show a gain; `ezhoi-diffusion compare` scores the whole split, against the controls."
    )
    return "\n".join(lines)

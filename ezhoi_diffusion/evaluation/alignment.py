"""Measures of how well pair features agree with the texts, and where that disagrees with mean AP.

u = x/|x| is a pair feature, v = T/|T| a text feature, w_c the unit text of target class c. A is the set of classes
annotated for a pair; an annotated pair has at least one.

centroid_gap: |mean u − mean v|, 0 to 2, after Liang et al., NeurIPS 2022.
mmd: unbiased MMD² of u and v, mean k(u, u') + mean k(v, v') − 2·mean k(u, v) over distinct features, with
    k(a, b) = exp(−|a − b|²/2σ²) and σ the median distance between texts; at most 2; about 0, also below, for equal
    distributions. Gretton et al., JMLR 2012.
cosine_to_own_text: mean over annotated pairs of the mean of u·w_c over c in A, −1 to 1; 1 less half of the alignment loss
    of Wang & Isola, ICML 2020 (α = 2), where w_c is the positive of u.
recall_at_1, recall_at_5: share of annotated pairs with a class of A among the k classes of largest u·w_c, 0 to 1; a tie
    counts against it. Hodosh et al., JAIR 2013.
top1: share of annotated pairs whose highest logit among possible targets is of a class of A, 0 to 1.
calibration_error: sum over 15 equal bins of p = sigmoid(logit) of the bin's share times |mean p − share annotated|, over
    possible targets of annotated pairs, 0 to 1. Guo et al., ICML 2017, with every target a prediction of its own.
mean_resultant_length: |mean of (u − mean v)/|u − mean v||, 0 to 1: what the features share without the text mean,
    as `features.statistics.mean_resultant_lengths`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ezhoi_diffusion.evaluation.bootstrap import REFERENCE
from ezhoi_diffusion.features.statistics import unit_sums
from ezhoi_diffusion.rng import generator

NUM_SAMPLED = 1000  # pairs for MMD, whose cost grows with their square
BINS = 15
NOTICEABLE = 0.01  # smallest change of a measure that is mentioned
NO_BETTER = "A smaller gap does not make a better detector: judge by mAP"
# the sign of a change that brings features nearer to the texts
NEARER = {"centroid_gap": -1, "mmd": -1, "cosine_to_own_text": 1, "recall_at_1": 1, "recall_at_5": 1}


def top_target(logits: Tensor, possible: Tensor) -> Tensor:
    """The target [P] int64 with the highest of logits [P, C] among the possible ones, [P, C] bool."""
    return logits.masked_fill(~possible, -torch.inf).argmax(1)


class Alignment:
    """The measures of one variant. Features come in pieces and are not kept.

    Args:
        text: Text features [N_sel, D], not normalised.
        class_text: The text feature of each target class, [C, D].
        text_mean: Mean of the unit text features, [D].
        pairs: Number of features that will come. MMD takes at most 1000, at the same positions for every variant.
    """

    def __init__(self, text: Tensor, class_text: Tensor, text_mean: Tensor, *, pairs: int) -> None:
        self._pairs = pairs
        self._seen = 0
        self._text = text
        self._class_text = F.normalize(class_text.double(), dim=-1)
        self._text_mean = text_mean.double()
        self._positions = torch.randperm(pairs, generator=generator(0, "alignment"))[:NUM_SAMPLED].sort().values
        self._sample = text.new_zeros(len(self._positions), text.shape[1], dtype=torch.float32)
        self._sum = torch.zeros_like(self._text_mean)
        self._sum_centred = torch.zeros_like(self._text_mean)
        self._annotated = 0
        self._sums = text.new_zeros(4, dtype=torch.float64)  # over annotated pairs: cosine, both recalls, top1
        self._targets = 0
        self._excess = text.new_zeros(BINS, dtype=torch.float64)  # probability − label, summed in each bin

    def add(self, features: Tensor, logits: Tensor, labels: Tensor, possible: Tensor) -> None:
        """Add the next n features; n may be 0.

        Args:
            features: [n, D].
            logits: [n, C].
            labels: Annotations [n, C] bool.
            possible: Targets that the pair's object class admits, [n, C] bool.
        """
        total, centred = unit_sums(features, self._text_mean[None])
        self._sum += total
        self._sum_centred += centred[0]
        begin, end = torch.searchsorted(
            self._positions, torch.tensor([self._seen, self._seen + len(features)])
        ).tolist()
        sampled = features[self._positions[begin:end] - self._seen]
        self._sample[begin:end] = F.normalize(sampled.double(), dim=-1).float()
        self._seen += len(features)

        known = labels.any(1)
        features, logits, labels, possible = features[known], logits[known], labels[known], possible[known]
        cosine = F.normalize(features.double(), dim=-1) @ self._class_text.T
        own = (cosine * labels).sum(1) / labels.sum(1)
        nearest_own = cosine.masked_fill(~labels, -torch.inf).amax(1, keepdim=True)
        others_before = ((cosine >= nearest_own) & ~labels).sum(1)
        right = labels.gather(1, top_target(logits, possible).unsqueeze(1))
        self._annotated += len(features)
        self._sums += torch.stack([x.double().sum() for x in (own, others_before < 1, others_before < 5, right)])
        probability, label = logits[possible].double().sigmoid(), labels[possible].double()
        self._targets += len(label)
        bins = (probability * BINS).long().clamp_max(BINS - 1)
        self._excess.index_add_(0, bins, probability - label)

    def measures(self) -> dict[str, float | None]:
        """Every measure by name. None where there is no feature, text or annotation to measure it on.

        Raises:
            ValueError: Fewer or more features came than were announced, so the samples of the variants would differ.
        """
        if self._seen != self._pairs:
            raise ValueError(f"{self._pairs} pairs were announced, and {self._seen} came")
        own, recall_at_1, recall_at_5, top1 = (self._sums / self._annotated).tolist() if self._annotated else [None] * 4
        return {
            "centroid_gap": float((self._sum / self._seen - self._text_mean).norm()) if self._seen else None,
            "mmd": _mmd(self._sample.double(), F.normalize(self._text.double(), dim=-1)),
            "cosine_to_own_text": own,
            "recall_at_1": recall_at_1,
            "recall_at_5": recall_at_5,
            "top1": top1,
            "calibration_error": float(self._excess.abs().sum()) / self._targets if self._targets else None,
            "mean_resultant_length": float((self._sum_centred / self._seen).norm()) if self._seen else None,
        }


def _mmd(features: Tensor, text: Tensor) -> float | None:
    if min(len(features), len(text)) < 2:
        return None
    bandwidth = torch.pdist(text).median().clamp_min(1e-12)  # of the texts alone, so that no bridge moves it

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-(torch.cdist(a, b) / bandwidth).square() / 2).exp()

    def within(x: Tensor) -> Tensor:
        return (kernel(x, x).sum() - len(x)) / (len(x) * (len(x) - 1))

    return float(within(features) + within(text) - 2 * kernel(features, text).mean())


def disagreements(alignment: Mapping[str, Mapping[str, float | None]], mean_ap: Mapping[str, float]) -> list[str]:
    """Warn of variants that are nearer to the texts without a higher mean AP, and note the opposite.

    Args:
        alignment: Variant -> measure -> value, as `Alignment.measures` gives them.
        mean_ap: Variant -> mean AP in percent.
    """
    found = []
    for variant, measures in alignment.items():
        nearer: list[str] = []
        farther: list[str] = []
        for name, sign in NEARER.items():
            before, after = alignment[REFERENCE][name], measures[name]
            if before is None or after is None or abs(after - before) <= NOTICEABLE:
                continue
            side = nearer if (after - before) * sign > 0 else farther
            side.append(f"{name} {before:.3f} -> {after:.3f}")
        change = round(mean_ap[variant] - mean_ap[REFERENCE], 2)  # what a table shows
        scores = f"({mean_ap[REFERENCE]:.2f} -> {mean_ap[variant]:.2f})"
        if nearer and change <= 0:
            found.append(
                f"WARNING: {variant} is nearer to the texts than {REFERENCE} ({', '.join(nearer)}), and mAP did not rise "
                f"{scores}. {NO_BETTER}."
            )
        elif farther and change > 0:
            found.append(
                f"NOTE: {variant} is farther from the texts than {REFERENCE} ({', '.join(farther)}), and mAP rose "
                f"{scores}."
            )
    return found

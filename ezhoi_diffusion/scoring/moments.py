"""Sums over pairs that closed forms need, in float64 from blocks of pairs: of all features, no more than a block is in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ezhoi_diffusion.features.labels import PairLabels


@dataclass(frozen=True, eq=False)
class Scatter:
    """Mean and scatter of rows.

    Two of them add up to that of all their rows, after Chan, Golub & LeVeque, "Algorithms for computing the sample variance", The
    American Statistician 1983. No row is squared before a mean was taken off it, so nothing cancels however large the mean is.

    Attributes:
        count: The number of rows.
        mean: [D] float64.
        products: [D, D] float64, Σ (x − mean)(x − mean)ᵀ.
    """

    count: int
    mean: Tensor
    products: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Scatter:
        """That of rows [n, D]."""
        x = x.double()
        mean = x.sum(0) / max(1, len(x))
        centred = (x - mean).numpy()
        # numpy takes a matrix times itself for what it is, and computes half of it
        return cls(len(x), mean, torch.from_numpy(centred.T @ centred))

    def __add__(self, other: Scatter) -> Scatter:
        count = self.count + other.count
        apart, share = other.mean - self.mean, other.count / max(1, count)
        products = self.products + other.products + self.count * share * torch.outer(apart, apart)
        return Scatter(count, self.mean + share * apart, products)

    @property
    def std(self) -> Tensor:
        """[] the standard deviation of rows of one number; 0 of fewer than two."""
        return (self.products.squeeze() / max(1, self.count - 1)).sqrt()

    def std_of(self, linear: Tensor, centre: Tensor | float = 0.0) -> Tensor:
        """[] the standard deviation of all entries of (x − centre)·linear, for `linear` [D, C] and `centre` [D]."""
        within = (linear * (self.products @ linear)).sum()
        means = (self.mean - centre) @ linear
        squares = within + self.count * (means - means.mean()).square().sum()
        return (squares / max(1, self.count * len(means) - 1)).sqrt()


def std_of(blocks: Iterable[Tensor]) -> Tensor:
    """[] float64, the standard deviation of all values in blocks, as `Scatter.std`."""
    total = Scatter.of(torch.zeros(0, 1))
    for block in blocks:
        total += Scatter.of(block.reshape(-1, 1))
    return total.std


@dataclass(frozen=True, eq=False)
class LabelMoments:
    """Features of labelled pairs, C classes, in sums.

    Attributes:
        background: Pairs without a label.
        annotated: The others.
        labelled: The same, each pair once for each of its labels.
        positives: [C] float64, the pairs that have a class.
        known: [C] float64, the pairs in which it counts.
        of_positives: [C, D] float64, the sum of the features of the pairs that have it.
        of_known: [C, D] float64, that of the pairs in which it counts.
    """

    background: Scatter
    annotated: Scatter
    labelled: Scatter
    positives: Tensor
    known: Tensor
    of_positives: Tensor
    of_known: Tensor

    @classmethod
    def of(cls, visual: Tensor, labels: PairLabels) -> LabelMoments:
        """That of a block of features [n, D]."""
        x, valid, annotated = visual.double(), labels.valid.double(), labels.target.any(1)
        row, target = labels.target.nonzero().unbind(1)
        labelled = x[row]
        return cls(
            background=Scatter.of(x[~annotated]),
            annotated=Scatter.of(x[annotated]),
            labelled=Scatter.of(labelled),
            positives=labels.target.sum(0).double(),
            known=valid.sum(0),
            of_positives=x.new_zeros(valid.shape[1], x.shape[1]).index_add_(0, target, labelled),
            of_known=valid.T @ x,
        )

    def __add__(self, other: LabelMoments) -> LabelMoments:
        return LabelMoments(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))

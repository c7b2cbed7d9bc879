"""The pairs that EZ-HOI is surest of, from blocks of pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Surest(NamedTuple):
    """The K pairs of each of C classes with the highest confidence, the surest first; of equals, those that were given first.

    Attributes:
        confidence: [K, C] float64.
        rows: [K, C] int64, which pairs they are.
    """

    confidence: Tensor
    rows: Tensor

    @classmethod
    def none(cls, classes: int) -> Surest:
        """Those of no pairs."""
        return cls(torch.zeros(0, classes, dtype=torch.float64), torch.zeros(0, classes, dtype=torch.long))

    def among(self, rows: Tensor, confidence: Tensor, count: int) -> Surest:
        """Those among these and other pairs, at most `count`.

        Args:
            rows: The other pairs [n] int64.
            confidence: Theirs [n, C] float64.
            count: The most that stay.
        """
        if len(self.rows) == count:  # most pairs are no rival, and to sort them all takes longer than the rest
            is_rival = (confidence > self.confidence[-1]).any(1)
            rows, confidence = rows[is_rival], confidence[is_rival]
        every = torch.cat([self.confidence, confidence])
        order = every.argsort(dim=0, descending=True, stable=True)[:count]
        rows = torch.cat([self.rows, rows.unsqueeze(1).expand_as(confidence)])
        return Surest(every.gather(0, order), rows.gather(0, order))

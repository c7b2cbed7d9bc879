"""Pair features of a store, read where they are asked for: a sample of them needs no room for all."""

from __future__ import annotations

import torch
from torch import Tensor

from ezhoi_diffusion.features.store import FeatureStore


class StoredRows:
    """Pair features [N, D] of a store, indexed like a tensor. Every indexing reads the store once.

    Args:
        store: Where they are.
        positions: Those that count [N] int64, in the store's order of pairs; all by default.
    """

    def __init__(self, store: FeatureStore, positions: Tensor | None = None) -> None:
        self._store = store
        self._positions = torch.arange(len(store)) if positions is None else positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The features [n, D] at positions [n] int64, in that order."""
        wanted, order = self._positions[indices].sort()
        found = self._store.text.new_empty(len(wanted), self._store.text.shape[1])
        begin = 0
        for shard in self._store.shards():
            features = shard["adapter_feat"]
            low, high = torch.searchsorted(wanted, torch.tensor([begin, begin + len(features)])).tolist()
            found[order[low:high]] = features[wanted[low:high] - begin]
            begin += len(features)
        return found

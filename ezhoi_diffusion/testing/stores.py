"""Captures that differ in one thing, and bridges that went through files: what tests of a bridge need."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from torch import Tensor

from ezhoi_diffusion.artifact import Artifact
from ezhoi_diffusion.features.store import FeatureStore

B = TypeVar("B")


class _Relabelled(FeatureStore):
    def __init__(self, store: FeatureStore, relabel: Callable[[dict[str, Tensor]], Tensor]) -> None:
        super().__init__(store.folder)
        self.ezhoi, self._relabel = store.ezhoi, relabel

    def shards(self) -> Iterator[dict[str, Tensor]]:
        for shard in super().shards():
            yield {**shard, "labels": self._relabel(shard)}


def relabelled(store: FeatureStore, relabel: Callable[[dict[str, Tensor]], Tensor]) -> FeatureStore:
    """The same capture with other labels: `relabel(shard)` returns those [n, C] bool of each shard."""
    return _Relabelled(store, relabel)


def with_full_rank_texts(store: FeatureStore) -> FeatureStore:
    """The same capture with texts of full rank, as a text encoder gives them; made-up ones span few dimensions."""
    other = copy.copy(store)
    noise = torch.randn(store.text.shape, generator=torch.Generator().manual_seed(0))
    other.ezhoi = {**store.ezhoi, "text": store.text + 0.1 * noise}
    return other


def reloaded(artifact: Artifact, load: Callable[[Path | None], B]) -> B:
    """Save the artefact into a folder and `load` it again."""
    with TemporaryDirectory() as folder:
        artifact.save(Path(folder))
        return load(Path(folder))

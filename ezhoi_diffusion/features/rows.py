"""Features that are read or made where they are asked for: a batch or a sample of them needs no room for all."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from resource import RLIMIT_NOFILE, getrlimit
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ezhoi_diffusion.checksums import checksum_of
from ezhoi_diffusion.features.store import FeatureStore

MAX_OPEN = getrlimit(RLIMIT_NOFILE)[0] // 4  # files at a time; on Linux 256, and HICO-DET has 219 shards


class Rows(Protocol):
    """Features [N, D]: a tensor, or what gives those that are asked for."""

    @property
    def shape(self) -> torch.Size:
        """N and D."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """The features [n, D] at positions [n] int64, in that order."""

    def split(self, size: int, /) -> Iterable[Tensor]:
        """All features in order, `size` at a time."""


class RepeatedRows:
    """Features [N, D] of which the i-th is the `of[i]`-th of a table [K, D]."""

    def __init__(self, table: Tensor, of: Tensor) -> None:
        self._table, self._of = table, of
        self.shape = torch.Size([len(of), table.shape[1]])

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The features [n, D] at positions [n] int64, in that order."""
        return self._table[self._of[indices]]

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all features in order, `size` at a time."""
        return (self._table[part] for part in self._of.split(size))


class StoredRows:
    """Pair features [N, D] of a store, or EZ-HOI's logits [N, C], indexed like a tensor.

    A shard is read whole the first time, and with it checked as `FeatureStore.shards` does. From then on features are read from
    their place in the open file: mapped memory would count as that of the process, and the system lets go of it late. After every
    read the file has to be the version that was checked. Otherwise the shard is read whole again, which fails if it has changed.

    Args:
        store: Where they are.
        positions: Those that count [N] int64, in the store's order of pairs; all by default.
        name: Which of the two.
    """

    def __init__(
        self,
        store: FeatureStore,
        positions: Tensor | None = None,
        name: Literal["adapter_feat", "logits"] = "adapter_feat",
    ) -> None:
        self._root, self._name, shards = store._root, name, store._root.index["shards"]
        self._rows: NDArray[np.int64] = store.positions().numpy()
        if positions is not None:
            self._rows = self._rows[positions.numpy()]
        self._ends: NDArray[np.int64] = np.cumsum([shard["rows"] for shard in shards])
        self._paths = [self._root.folder / shard["file"] for shard in shards]
        self._digests = [shard["sha256"] for shard in shards]
        width = store.ezhoi["text" if name == "adapter_feat" else "label"].shape[1]
        self.shape = torch.Size([len(self._rows), width])
        self._places: dict[int, int] = {}  # number of a shard that was checked -> where its values begin in the file
        self._files: dict[int, int] = {}  # number of a shard -> descriptor
        weakref.finalize(self, _close, self._files)

    def __reduce__(self) -> Any:
        raise TypeError("open files stay in their process")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The features [n, D] float32 at positions [n] int64, in that order. Raises FeatureStoreError where they were changed."""
        wanted = self._rows[indices.numpy()]
        order = np.argsort(wanted, kind="stable")
        rows = wanted[order]
        numbers = np.searchsorted(self._ends, rows, side="right")
        first = rows - np.concatenate([[0], self._ends])[numbers]
        # neighbours in a file are read together
        is_new = np.r_[True, (np.diff(rows) != 1) | (np.diff(numbers) != 0)][: len(rows)]
        begins = np.flatnonzero(is_new)
        runs = zip(
            numbers[begins].tolist(),
            first[begins].tolist(),
            begins.tolist(),
            [*begins[1:].tolist(), len(rows)],
            strict=False,
        )
        found = np.empty((len(rows), self.shape[1]), np.float32)
        for number, of_shard in groupby(runs, itemgetter(0)):
            self._read(number, [*of_shard], found)
        if len(order) and (np.diff(order) != 1).any():
            unsorted = np.empty_like(found)
            unsorted[order] = found
            found = unsorted
        return torch.from_numpy(found)

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all features in order, `size` at a time."""
        for indices in torch.arange(len(self), device="cpu").split(size):
            yield self[indices]

    def _read(self, number: int, runs: list[tuple[int, int, int, int]], found: NDArray[np.float32]) -> None:
        """Fill `found` [n, D] with features of a shard.

        Args:
            number: The shard.
            runs: For features that follow each other: the shard, the first of them there, and where they begin and end in `found`.
            found: Where they go.
        """
        with suppress(OSError):  # what is wrong with a file is said where it is read whole
            if number in self._places and self._read_in_place(number, runs, found):
                return
        whole = self._root._read_shard(number)[self._name].numpy()
        for _, first, begin, end in runs:
            found[begin:end] = whole[first : first + end - begin]
        with suppress(OSError):
            self._find_place(number)

    def _read_in_place(self, number: int, runs: list[tuple[int, int, int, int]], found: NDArray[np.float32]) -> bool:
        """Fill `found` from the open file. Returns whether that is the file that was checked."""
        file, place = self._file(number), self._places[number]
        room, size = found.view(np.uint8).reshape(-1).data, found.strides[0]
        read = sum(
            os.preadv(file, [room[begin * size : end * size]], place + first * size) for _, first, begin, end in runs
        )
        is_whole = read == size * sum(end - begin for *_, begin, end in runs)
        return is_whole and checksum_of(os.fstat(file)) == self._digests[number]

    def _find_place(self, number: int) -> None:
        """Remember where the features of a shard begin in its file, if the file is the one that was checked."""
        file = self._file(number)
        if checksum_of(os.fstat(file)) == self._digests[number]:
            length = int.from_bytes(os.pread(file, 8, 0), "little")  # https://github.com/huggingface/safetensors#format
            self._places[number] = 8 + length + json.loads(os.pread(file, length, 8))[self._name]["data_offsets"][0]
        else:  # replaced meanwhile, or touched in this very tick of the clock
            self._places.pop(number, None)
            os.close(self._files.pop(number))

    def _file(self, number: int) -> int:
        """The descriptor of a shard's file, which stays open."""
        found = self._files.get(number)
        if found is None:
            if len(self._files) == MAX_OPEN:
                os.close(self._files.popitem()[1])  # the newest: every batch goes through the shards in order
            found = self._files[number] = os.open(self._paths[number], os.O_RDONLY | os.O_NONBLOCK)
        return found


def _close(files: dict[int, int]) -> None:
    for file in files.values():
        os.close(file)

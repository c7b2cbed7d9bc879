"""Write a store: as a stream that may be killed at any moment, from one or several processes, or as a whole import."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from ezhoi_diffusion.features.batch import FeatureBatch
from ezhoi_diffusion.features.contents import ezhoi_problem
from ezhoi_diffusion.features.shard import Shard
from ezhoi_diffusion.features.store import (
    AGAIN,
    EZHOI,
    INDEX,
    META,
    SCHEMA,
    FeatureStore,
    FeatureStoreError,
    ShardEntry,
    StoreMeta,
    counts_problem,
    read_ezhoi_tensors,
)
from ezhoi_diffusion.files import (
    leftovers,
    make_folder,
    new_folder,
    read_json,
    require_unchanged,
    require_unused,
    write_json,
    write_tensors,
)
from ezhoi_diffusion.locks import LOCK, locked
from ezhoi_diffusion.schema import FileFacts

# A killed capture loses at most two shards or a minute of work. At D = 512 a shard is 10 MiB, whatever the size of the capture.
ROWS_PER_SHARD, SECONDS_PER_SHARD = 4_096, 60.0


class FeatureWriter:
    """Writes the part of a store that one process captures. One process then calls `finish_store`.

    A folder with an unfinished capture of the same run and split is resumed after its last complete shard. Images before
    `next_index` are stored already, and adding them again does nothing.

    A thread checks and writes the shards, so that the pass does not wait for the disk. While one shard is written the next
    fills; `add` waits if that is full too, so at most two are in memory. An error in the thread is raised by the next `add`,
    `flush` or `close`, and nothing is written after it.

    Raises:
        FeatureStoreError: The folder holds anything else or was changed, or another process is writing there.
    """

    def __init__(
        self,
        folder: Path,
        meta: dict[str, Any],
        *,
        rank: int = 0,
        rows_per_shard: int = ROWS_PER_SHARD,
        seconds_per_shard: float = SECONDS_PER_SHARD,
    ) -> None:
        self.folder = folder
        self.rank = rank
        self.rows_per_shard = rows_per_shard
        self.seconds_per_shard = seconds_per_shard
        try:
            make_folder(folder)
            with ExitStack() as undo:
                undo.enter_context(locked(folder, FeatureStoreError, f"{LOCK}-{rank:03d}"))
                self._open({"schema": SCHEMA, **meta})
                shards = _captured(folder, rank)
                self._lock = undo.pop_all()
        except OSError as error:
            raise FeatureStoreError(f"{folder} cannot be written ({error}): choose another folder") from error
        self.next_index = shards[-1]["images"][-1]["index"] + 1 if shards else 0
        self._shards = len(shards)
        self._pending, self._spare = (Shard(rows_per_shard) for _ in range(2))
        self._flushed = time.monotonic()
        # starts with the first shard, after EZ-HOI's data loader has forked its processes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feature-writer")
        self._writing: Future[None] | None = None
        self._closed = False

    def _open(self, meta: dict[str, Any]) -> None:
        folder = self.folder
        if (folder / INDEX).exists():
            raise FeatureStoreError(f"{folder} holds a finished capture: give another folder, or delete it")
        if (folder / META).exists():
            _require_same(folder, read_json(folder / META, StoreMeta, FeatureStoreError, AGAIN), meta)
        elif self.rank == 0 and {*folder.iterdir()} - {*leftovers(folder), *folder.glob(f"{LOCK}*")}:
            raise FeatureStoreError(f"{folder} is not empty and holds no capture: give another folder")
        if self.rank == 0:  # the other ranks wait until it has opened the folder
            for path in leftovers(folder):
                path.unlink(missing_ok=True)
            if not (folder / META).exists():
                write_json(folder / META, meta)

    def add(self, batch: FeatureBatch) -> None:
        """Append one image; its tensors may change afterwards.

        Raises:
            FeatureStoreError: This image or an earlier one has a value that cannot be, or the disk refuses. It is
                raised before the shard after that image's begins.
        """
        if self._closed:
            raise FeatureStoreError(f"{self.folder}: an image was added after the capture was closed")
        if self._writing is not None and self._writing.done():
            self._wait()
        if batch.index < self.next_index:
            return
        if not self._pending.has_room(len(batch.pairs)):
            self._hand_over()
        self._pending.add(batch)
        self.next_index = batch.index + 1
        if self._pending.rows >= self.rows_per_shard or time.monotonic() - self._flushed >= self.seconds_per_shard:
            self._hand_over()

    def _hand_over(self) -> None:
        self._wait()
        self._flushed = time.monotonic()
        if self._pending.images:
            self._writing = self._thread.submit(self._write, self._shards, self._pending)
            self._shards += 1
            self._pending, self._spare = self._spare, self._pending

    def _wait(self) -> None:
        """Wait for the shard that is being written. Raises its error now and on every later call: no shard may follow it."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, number: int, shard: Shard) -> None:
        """In the thread: write the images before the first that is not valid, and empty the shard."""
        problem = shard.keep_valid()
        if shard.images:
            name = _shard_name(self.rank, number)
            try:
                written = write_tensors(self.folder / f"{name}.safetensors", shard.tensors())
                write_json(self.folder / f"{name}.json", {**written, "rows": shard.rows, "images": shard.entries()})
            except OSError as error:
                raise FeatureStoreError(
                    f"{self.folder} could not take {name} ({error}): free space there and run the same command again to resume"
                ) from error
        shard.clear()
        if problem:
            raise FeatureStoreError(problem)

    def flush(self) -> None:
        """Write the pending images as one shard and wait until it is on disk. Raises FeatureStoreError, as `add` does."""
        self._hand_over()
        self._wait()
        self._pending, self._spare = (Shard(self.rows_per_shard) for _ in range(2))  # frees their memory

    def keep_ezhoi_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write the tensors that EZ-HOI's score needs, unless they are stored already. Returns the stored ones.

        Raises:
            FeatureStoreError: They are not what EZ-HOI's are, or the disk refuses.
        """
        try:
            with locked(self.folder, FeatureStoreError, f"{LOCK}-ezhoi", wait=True):
                if not os.path.lexists((self.folder / EZHOI).with_suffix(".json")):
                    problem = ezhoi_problem(tensors, imported=False)
                    if problem:
                        raise FeatureStoreError(
                            f"{self.folder} cannot take the tables of this run ({problem}): does EZ-HOI score without plugins?"
                        )
                    write_ezhoi_tensors(self.folder, tensors)
        except OSError as error:
            raise FeatureStoreError(
                f"{self.folder} could not take {EZHOI} ({error}): free space there and run the same command again"
            ) from error
        facts = _read_entry(self.folder, EZHOI, FileFacts)
        return read_ezhoi_tensors(self.folder, facts, imported=False)

    def close(self) -> None:
        """Wait for the shard that is being written, drop pending images, and release the folder.

        Raises:
            FeatureStoreError: As `add` does.
        """
        try:
            self._wait()
        finally:
            self._closed = True
            self._thread.shutdown()
            self._lock.close()


def write_ezhoi_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write ezhoi.safetensors: what EZ-HOI's score needs beside the features. Raises OSError."""
    write_json((folder / EZHOI).with_suffix(".json"), write_tensors(folder / EZHOI, tensors))


def finish_store(folder: Path) -> FeatureStore:
    """Merge the shards of all processes into the index and open the store. Raises FeatureStoreError."""
    _merge(folder)
    return FeatureStore(folder)


def _merge(folder: Path) -> None:
    entries = sorted(folder.glob("shard-[0-9][0-9][0-9]-*.json"))
    ranks = sorted({int(path.name[6:9]) for path in entries})
    shards = [shard for rank in ranks for shard in _captured(folder, rank)]
    if not any(shard["rows"] for shard in shards):
        raise FeatureStoreError(
            f"{folder}: no image had a human-object pair, so there is nothing to store: is --pretrained the right detector?"
        )
    order = [image["index"] for shard in shards for image in shard["images"]]
    if order != list(range(len(order))):
        raise FeatureStoreError(f"{folder} lacks images between those it has: run the capture command again")
    index = {
        "schema": SCHEMA,
        "rows": sum(shard["rows"] for shard in shards),
        "images": len(order),
        "meta": read_json(folder / META, StoreMeta, FeatureStoreError, AGAIN),
        "ezhoi": _read_entry(folder, EZHOI, FileFacts),
        "shards": shards,
    }
    try:
        write_json(folder / INDEX, index)
        for path in _superseded(folder):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise FeatureStoreError(
            f"{folder} could not take {INDEX} ({error}): free space there and run the same command again"
        ) from error


def clear_finished(folder: Path) -> None:
    """Remove what a capture has left that was killed after it wrote the index. Raises FeatureStoreError where it still runs."""
    try:
        for lock in folder.glob(f"{LOCK}*"):
            with locked(folder, FeatureStoreError, lock.name):
                pass
        for path in _superseded(folder):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise FeatureStoreError(
            f"{folder} is finished, and what a killed capture left there stays ({error})"
        ) from error


def _superseded(folder: Path) -> list[Path]:
    """Files whose content the index has, and temporary ones."""
    entries = folder.glob("shard-[0-9][0-9][0-9]-*.json")
    return [*entries, *folder.glob(Path(EZHOI).with_suffix(".json").name), *leftovers(folder)]


def write_imported(
    folder: Path, meta: dict[str, Any], tensors: dict[str, Tensor], images: Sequence[str], ezhoi: dict[str, Tensor]
) -> FeatureStore:
    """Write a store of features that this package did not capture, and open it.

    Args:
        folder: A new folder; it is written completely or not at all.
        meta: The store's meta. `meta["imported"]` is the origin, with `norms`: whether the norms are EZ-HOI's.
        tensors: `adapter_feat` [N, D], and further tensors of a capture with N entries.
        images: The file name of each of the N pairs' images.
        ezhoi: `text` [N_sel, D], which may be empty, and `text_mean` [D].

    Raises:
        FeatureStoreError: `folder` is in use or cannot be written.
    """
    require_unused(folder, FeatureStoreError)
    places: dict[str, list[int]] = {}
    for row, name in enumerate(images):  # a store keeps an image's pairs together
        places.setdefault(name, []).append(row)
    try:
        with new_folder(folder) as staged:
            write_json(staged / META, {"schema": SCHEMA, **meta})
            write_ezhoi_tensors(staged, ezhoi)
            number, shard = 0, list[int]()
            entries: list[dict[str, Any]] = []
            for index, (name, numbers) in enumerate(places.items()):
                shard += numbers
                entries.append({"index": index, "name": name, "rows": len(numbers), "boxes": 0, "annotations": 0})
                if len(shard) >= ROWS_PER_SHARD or index == len(places) - 1:
                    name = _shard_name(0, number)
                    written = write_tensors(staged / f"{name}.safetensors", {k: t[shard] for k, t in tensors.items()})
                    write_json(staged / f"{name}.json", {**written, "rows": len(shard), "images": entries})
                    number, shard, entries = number + 1, [], []
            finish_store(staged)
    except OSError as error:
        raise FeatureStoreError(
            f"{folder} could not be written ({error}): choose another folder, or free space"
        ) from error
    return FeatureStore(folder)


def _require_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if changed:
        listed = "; ".join(f"{key}: there {old.get(key)!r}, now {new.get(key)!r}" for key in changed)
        raise FeatureStoreError(
            f"{folder} holds an unfinished capture of another run or split ({listed:.600}): give another folder"
        )


def _shard_name(rank: int, number: int) -> str:
    return f"shard-{rank:03d}-{number:05d}"


def _read_entry(folder: Path, name: str, schema: Any) -> dict[str, Any]:
    """Read the facts beside a file of an unfinished capture, and check the file against them."""
    facts = read_json((folder / name).with_suffix(".json"), schema, FeatureStoreError, AGAIN)
    require_unchanged(folder / name, facts, FeatureStoreError, AGAIN)
    return facts


def _captured(folder: Path, rank: int) -> list[dict[str, Any]]:
    """Shard entries of one process so far, in order. Raises FeatureStoreError where one is missing or damaged."""
    found = sorted(folder.glob(f"{_shard_name(rank, 0)[:9]}-*.json"))
    shards = [_read_entry(folder, path.with_suffix(".safetensors").name, ShardEntry) for path in found]
    order, problem = [image["index"] for shard in shards for image in shard["images"]], None
    if order != list(range(order[0] if order else 0, len(order) + (order[0] if order else 0))):
        problem = "an image is missing"
    for number, (path, shard) in enumerate(zip(found, shards, strict=True)):
        if not path.stem == Path(shard["file"]).stem == _shard_name(rank, number):
            problem = f"{path.name} is not of {_shard_name(rank, number)}: a shard is missing"
        problem = problem or counts_problem(shard)
    if problem:
        raise FeatureStoreError(f"the unfinished capture in {folder} is damaged ({problem}); {AGAIN}")
    return shards

"""A folder of captured features: sharded safetensors with an index, written as a stream.

    meta.json                      what was captured, from which host (written first)
    host.safetensors               text features and tables that the host's score needs
    shard-000-00000.safetensors    rows of some images
    index.json                     meta, totals, the shards in order, sizes and hashes (written last: without it the
                                   store is unfinished)

While it is captured, a .json beside a .safetensors has its size and hash and is what makes it count. Rows are in the order
of the split's images, whatever the number of processes that captured them. An imported store has fewer tensors: what is
not in it is a typed error, and its text_mean may be known without text rows.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.batch import FeatureBatch, Pairs
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.files import (
    LOCK,
    leftovers,
    locked,
    new_folder,
    read_json,
    read_tensors,
    require_unchanged,
    write_json,
    write_tensors,
)

SCHEMA = 2
# A killed capture loses what it had not written yet: two shards, or the work of a minute. At D = 512 a shard is 10 MiB, and
# so small that a capture of 10,000 pairs needs the memory that one of millions does.
ROWS_PER_SHARD, SECONDS_PER_SHARD = 4_096, 60.0
LARGEST_IMAGE = 512  # pairs of an image for which there is still room in a shard that is nearly full
LARGE = {"adapter_feat": torch.float32, "logits": torch.float32, "labels": torch.bool}
META, INDEX, HOST = "meta.json", "index.json", "host.safetensors"
AGAIN = "capture it again, into a new folder"


class FeatureStoreError(EzhoiDiffusionError):
    """A feature folder is missing, unfinished, damaged, or not what was asked for."""


class FeatureWriter:
    """Writes the part of a store that one process captures; finish with `finish_store` on one process.

    Opening a folder that holds an unfinished capture of the same host and split goes on after its last whole shard:
    images before `next_index` are there already, and adding them again does nothing. Raises FeatureStoreError where the
    folder holds anything else, a file in it was changed, or another process is writing there.

    A thread checks, writes and flushes the shards, one after the other, so that the pass does not wait for the disk. While
    one is written the next one fills; where that is full first, `add` waits. So no more than two are ever in memory. What
    goes wrong in the thread is raised by the next `add`, `flush` or `close`, and nothing is written after it.
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
            folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as undo:
                undo.enter_context(locked(folder, FeatureStoreError, f"{LOCK}-{rank:03d}"))
                self._open({"schema": SCHEMA, **meta})
                shards = _captured(folder, rank)
                self._lock = undo.pop_all()
        except OSError as error:
            raise FeatureStoreError(
                f"{folder} cannot be written ({error}): choose a folder you can write to"
            ) from error
        self.next_index = shards[-1]["images"][-1]["index"] + 1 if shards else 0
        self._shards = len(shards)
        self._pending, self._spare = (_Shard(rows_per_shard) for _ in range(2))
        self._flushed = time.monotonic()
        # it starts with the first shard, after the host's loader has forked its processes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feature-writer")
        self._writing: Future[None] | None = None
        self._closed = False

    def _open(self, meta: dict[str, Any]) -> None:
        folder = self.folder
        if (folder / INDEX).exists():
            raise FeatureStoreError(f"{folder} holds a finished capture already: give another folder, or delete it")
        if (folder / META).exists():
            _require_same(folder, read_json(folder / META, FeatureStoreError, AGAIN), meta)
        elif self.rank == 0 and {*folder.iterdir()} - {*leftovers(folder), *folder.glob(f"{LOCK}*")}:
            raise FeatureStoreError(f"{folder} is not empty and holds no capture: give another folder")
        if self.rank == 0:  # the others wait until it has opened the folder
            for path in leftovers(folder):
                path.unlink(missing_ok=True)
            if not (folder / META).exists():
                write_json(folder / META, meta)

    def add(self, batch: FeatureBatch) -> None:
        """Append one image; its tensors may change afterwards.

        Raises FeatureStoreError where this image, or one that was added before, has a value that is not finite, or the
        disk refuses: at the latest before the shard after that image's is begun.
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
        """Until no shard is being written. What went wrong with one is raised from now on, for nothing may follow it."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, number: int, shard: _Shard) -> None:
        """In the thread: write the images before the first that could not be read back, and empty the shard."""
        problem = shard.keep_finite()
        if shard.images:
            name = _shard_name(self.rank, number)
            try:
                written = write_tensors(self.folder / f"{name}.safetensors", shard.tensors())
                images = [_image_entry(batch) for batch in shard.images]
                write_json(self.folder / f"{name}.json", {**written, "rows": shard.rows, "images": images})
            except OSError as error:
                raise FeatureStoreError(
                    f"{self.folder} could not take {name} ({error}): free space there and give the same command again; "
                    f"what was captured so far is kept"
                ) from error
        shard.clear()
        if problem:
            raise FeatureStoreError(problem)

    def flush(self) -> None:
        """Write what is pending as one shard, and wait until it is on disk. Raises FeatureStoreError, as `add` does."""
        self._hand_over()
        self._wait()
        self._pending, self._spare = (_Shard(self.rows_per_shard) for _ in range(2))  # their memory is let go

    def keep_host_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write what the host's score needs, unless that is there already; returns what is there."""
        try:
            with locked(self.folder, FeatureStoreError, f"{LOCK}-host", wait=True):
                if not os.path.lexists((self.folder / HOST).with_suffix(".json")):
                    write_host_tensors(self.folder, tensors)
        except OSError as error:
            raise FeatureStoreError(
                f"{self.folder} could not take {HOST} ({error}): free space there and give the same command again"
            ) from error
        return read_tensors(self.folder / HOST, _read_entry(self.folder, HOST), FeatureStoreError, AGAIN)

    def close(self) -> None:
        """Let other processes write into the folder, once what is being written is; what is pending is dropped.

        Raises FeatureStoreError, as `add` does.
        """
        try:
            self._wait()
        finally:
            self._closed = True
            self._thread.shutdown()
            self._lock.close()


def write_host_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write what the host's score needs beside the features. Raises OSError."""
    write_json((folder / HOST).with_suffix(".json"), write_tensors(folder / HOST, tensors))


def is_captured(folder: Path, meta: dict[str, Any]) -> bool:
    """Whether a folder holds a finished capture of this. Raises FeatureStoreError where what it holds is damaged."""
    return (folder / INDEX).exists() and FeatureStore(folder).meta == {"schema": SCHEMA, **meta}


def finish_store(folder: Path) -> FeatureStore:
    """Merge the shards of all processes into the index, and open the store. Raises FeatureStoreError."""
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
        raise FeatureStoreError(f"{folder} lacks images between those it has: give the capture command again")
    index = {
        "schema": SCHEMA,
        "rows": sum(shard["rows"] for shard in shards),
        "images": len(order),
        "meta": read_json(folder / META, FeatureStoreError, AGAIN),
        "host": _read_entry(folder, HOST),
        "shards": shards,
    }
    try:
        write_json(folder / INDEX, index)
        for path in (*entries, (folder / HOST).with_suffix(".json"), *leftovers(folder)):
            path.unlink(missing_ok=True)  # the index has what they say
    except OSError as error:
        raise FeatureStoreError(
            f"{folder} could not take {INDEX} ({error}): free space there and give the same command again"
        ) from error


def write_imported(
    folder: Path, meta: dict[str, Any], rows: dict[str, Tensor], images: Sequence[str], host: dict[str, Tensor]
) -> FeatureStore:
    """Write a store of features that were captured elsewhere, whole or not at all, and open it.

    `rows` has `adapter_feat` [N, D], perhaps more of what a capture has; `images` the N file names; `meta["imported"]` says
    where they come from, and with `norms` whether the rows' norms are the host's. `host` has `text`, which may have no rows,
    and the `text_mean` [D]. Raises FeatureStoreError where `folder` is in use or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FeatureStoreError(f"{folder} is in use: give a new folder")
    places: dict[str, list[int]] = {}
    for row, name in enumerate(images):  # an image's rows stand together in a store
        places.setdefault(name, []).append(row)
    try:
        with new_folder(folder) as staged:
            write_json(staged / "meta.json", {"schema": SCHEMA, **meta})
            write_host_tensors(staged, host)
            number, shard = 0, list[int]()
            entries: list[dict[str, Any]] = []
            for index, (name, numbers) in enumerate(places.items()):
                shard += numbers
                entries.append({"index": index, "name": name, "rows": len(numbers), "boxes": 0, "annotations": 0})
                if len(shard) >= ROWS_PER_SHARD or index == len(places) - 1:
                    name = f"shard-000-{number:05d}"
                    written = write_tensors(staged / f"{name}.safetensors", {k: t[shard] for k, t in rows.items()})
                    write_json(staged / f"{name}.json", {**written, "rows": len(shard), "images": entries})
                    number, shard, entries = number + 1, [], []
            finish_store(staged)
    except OSError as error:
        raise FeatureStoreError(
            f"{folder} could not be written ({error}): choose another folder, or free space"
        ) from error
    return FeatureStore(folder)


class FeatureStore:
    """Reads a finished store. Raises FeatureStoreError where it is missing, unfinished or damaged."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            what = (
                "is unfinished: give the capture command again"
                if (self.folder / META).is_file()
                else (
                    "holds no captured features: make them with `ezhoi-diffusion run main_tip_finetune.py … --plugin capture "
                    "--capture DIR`"
                )
            )
            raise FeatureStoreError(f"{self.folder} {what}")
        self.index = read_json(self.folder / INDEX, FeatureStoreError, AGAIN)
        try:
            self._check()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FeatureStoreError(
                f"{self.folder} is damaged ({type(error).__name__}: {error} in {META}, {INDEX} or {HOST}); {AGAIN}"
            ) from error

    def _check(self) -> None:
        """Everything but the rows: those are checked when they are read."""
        self.meta = read_json(self.folder / META, FeatureStoreError, AGAIN)
        for value, file in ((self.meta, META), (self.index, INDEX)):
            if value.get("schema") != SCHEMA:
                raise FeatureStoreError(
                    f"{self.folder / file} has schema {value.get('schema')}, this version reads {SCHEMA}: {AGAIN}"
                )
        if self.meta != self.index["meta"]:
            raise FeatureStoreError(f"{self.folder / META} belongs to another capture than {INDEX}; {AGAIN}")
        self.host = read_tensors(self.folder / HOST, self.index["host"], FeatureStoreError, AGAIN)
        _require(self.split in ("train", "test"), f"the split is {self.split!r}")
        _require(isinstance(self.meta["fingerprint"], dict), "the fingerprint is no object")
        imported = self.imported is not None
        _require(self.text.ndim == 2 and (imported or self.text.numel() > 0), f"text has shape {list(self.text.shape)}")
        _require(self.text.dtype == torch.float32, f"text is {self.text.dtype}")
        for shard in self.index["shards"]:
            _require(SHARD.fullmatch(shard["file"]), f"{shard['file']!r} is no name of a shard")
            _require_counts(shard)
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                raise FeatureStoreError(f"{path} has {size} bytes where the index says {shard['bytes']}; {AGAIN}")
        images = self.images
        _require([i["index"] for i in images] == list(range(len(images))), "images are missing or not in order")
        _require(len(self) == sum(image["rows"] for image in images) > 0, f"rows is {self.index['rows']}")
        _require(self.index["images"] == len(images), f"images is {self.index['images']}")

    def __len__(self) -> int:
        return int(self.index["rows"])

    @property
    def split(self) -> str:
        """`train` or `test`."""
        return str(self.meta["split"])

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The host's fingerprint, as JSON."""
        return dict(self.meta["fingerprint"])

    @property
    def text(self) -> Tensor:
        """[N_sel, D] float32, the text features that the host multiplied with."""
        return self.host["text"]

    @property
    def context(self) -> dict[str, Tensor]:
        """The host's context vectors."""
        return {name.removeprefix("context/"): t for name, t in self.host.items() if name.startswith("context/")}

    @property
    def images(self) -> list[dict[str, Any]]:
        """One entry for every image in order: name, rows, boxes, annotations."""
        return [image for shard in self.index["shards"] for image in shard["images"]]

    def shards(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of each shard in order. Raises FeatureStoreError where one is not as it was captured."""
        for shard in self.index["shards"]:
            path = self.folder / shard["file"]
            tensors = read_tensors(path, shard, FeatureStoreError, AGAIN)
            problem = _rows_problem(tensors, shard, self.text.shape[1], imported=self.imported is not None)
            if problem:
                raise FeatureStoreError(f"{path}: {problem}; {AGAIN}")
            yield tensors

    def adapter_feat(self) -> Tensor:
        """[N, D] float32, all rows."""
        return self.rows("adapter_feat")

    def rows(self, name: str) -> Tensor:
        """One tensor of the shards over all rows (or boxes, or annotations), concatenated on dim 0."""
        return torch.cat([shard[name] for shard in self.shards() if self._require(name, shard)])

    @property
    def imported(self) -> dict[str, Any] | None:
        """Where the rows come from, if they were not captured by this package."""
        found: dict[str, Any] | None = self.meta.get("imported")
        return found

    @property
    def norms_known(self) -> bool:
        """Whether rows have the norms that the host gave them; an imported store may have their directions only."""
        return self.imported is None or bool(self.imported["norms"])

    def require_training_images(self, what: str) -> None:
        """Raise FeatureStoreError, saying `what` learns from training images only, in a store of another split."""
        if self.split != "train":
            raise FeatureStoreError(
                f"{self.folder} holds the {self.split} split: {what} training images only; capture those with --capture-split train"
            )

    def require_captured(self, what: str) -> None:
        """Raise FeatureStoreError, saying that `what` is not known, in an imported store."""
        if self.imported is not None:
            raise FeatureStoreError(
                f"{self.folder} was imported, and {what} was not in the files it comes from: capture the features with "
                f"`ezhoi-diffusion run main_tip_finetune.py … --plugin capture --capture DIR`"
            )

    def _require(self, name: str, shard: dict[str, Tensor]) -> bool:
        if name not in shard:
            self.require_captured(f"'{name}'")
        return True

    def image_index(self) -> Tensor:
        """[N] int64, for each row the position of its image in `images`."""
        counts = torch.tensor([image["rows"] for image in self.images], dtype=torch.long)
        return torch.repeat_interleave(torch.arange(len(counts)), counts)

    def statistics(self) -> ModalityStatistics:
        """Means over all rows and over the text features, as a stream. Raises FeatureStoreError without rows."""
        blocks = (shard["adapter_feat"] for shard in self.shards())
        try:
            if "text_mean" in self.host:
                return ModalityStatistics.around(blocks, self.host["text_mean"], len(self.text))
            return ModalityStatistics.of(blocks, self.text)
        except ValueError as error:
            raise FeatureStoreError(f"{self.folder}: {error}; capture a split whose images have pairs") from error


def _require_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if changed:
        listed = "; ".join(f"{key}: there {old.get(key)!r}, now {new.get(key)!r}" for key in changed)
        raise FeatureStoreError(
            f"{folder} holds an unfinished capture of something else ({listed:.600}): give another folder"
        )


SHARD = re.compile(r"shard-(\d{3})-(\d{5})\.safetensors")


def _shard_name(rank: int, number: int) -> str:
    return f"shard-{rank:03d}-{number:05d}"


def _read_entry(folder: Path, name: str) -> dict[str, Any]:
    """What the .json beside a file of an unfinished capture says, if the file is as it was written."""
    facts = read_json((folder / name).with_suffix(".json"), FeatureStoreError, AGAIN)
    try:
        require_unchanged(folder / name, facts, FeatureStoreError, AGAIN)
    except KeyError as error:
        raise FeatureStoreError(f"{folder / name} has an entry without {error}; {AGAIN}") from error
    return facts


def _captured(folder: Path, rank: int) -> list[dict[str, Any]]:
    """What one process has captured so far, in order. Raises FeatureStoreError where something of it is gone."""
    found = sorted(folder.glob(f"{_shard_name(rank, 0)[:9]}-*.json"))
    shards = [_read_entry(folder, path.with_suffix(".safetensors").name) for path in found]
    names = [f"{_shard_name(rank, number)}.safetensors" for number in range(len(shards))]
    try:
        for shard in shards:
            _require_counts(shard)
        order = [image["index"] for shard in shards for image in shard["images"]]
        _require(names == [shard["file"] for shard in shards], "a shard is missing")
        _require(not order or order == list(range(order[0], order[0] + len(order))), "an image is missing")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FeatureStoreError(f"the unfinished capture in {folder} is damaged ({error}); {AGAIN}") from error
    return shards


def _require(holds: object, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _require_counts(shard: dict[str, Any]) -> None:
    """Raises ValueError, TypeError, KeyError unless an index entry has images with counts, and their sum of rows."""
    for image in shard["images"]:
        counts = [image[key] for key in ("index", "rows", "boxes", "annotations")]
        _require(all(type(n) is int and n >= 0 for n in counts), f"an image has the counts {counts}")
        _require(image["name"] is None or isinstance(image["name"], str), f"an image has the name {image['name']!r}")
    rows = sum(image["rows"] for image in shard["images"])
    _require(
        shard["images"] and shard["rows"] == rows, f"{shard['file']} has {shard['rows']!r} rows, its images {rows}"
    )


def _rows_problem(tensors: dict[str, Tensor], shard: dict[str, Any], dim: int, *, imported: bool) -> str | None:
    """What is wrong with the tensors of a shard, held against its entry in the index and the text's width.

    An imported one may lack all but adapter_feat.
    """
    images = shard["images"]
    counts = {key: sum(image[key] for image in images) for key in ("rows", "boxes", "annotations")}
    rows, boxes, annotations, whole, real = *counts.values(), torch.int32, torch.float32
    expected: dict[str, tuple[torch.dtype, list[int | None]]] = {
        "adapter_feat": (real, [rows, dim]), "pairing": (whole, [rows, 2]), "objects": (whole, [rows]),
        "logits": (real, [rows, None]), "labels": (torch.bool, [rows, None]), "boxes": (real, [boxes, 4]), "scores": (real, [boxes]),
        "classes": (whole, [boxes]), "sizes": (whole, [len(images), 2]), "gt_boxes": (real, [annotations, 2, 4]),
        "gt_hoi": (whole, [annotations]),
    }  # fmt: skip
    if imported and "adapter_feat" in tensors:
        expected = {name: what for name, what in expected.items() if name in tensors}
    if tensors.keys() != expected.keys():
        return f"it holds {', '.join(sorted(tensors))} instead of {', '.join(sorted(expected))}"
    for name, (dtype, shape) in expected.items():
        x = tensors[name]
        fits = x.ndim == len(shape) and all(want in (None, n) for n, want in zip(x.shape, shape, strict=True))
        if x.dtype != dtype or not fits:
            return f"{name} is {x.dtype} {list(x.shape)} instead of {dtype} {shape}"
    if "pairing" not in tensors:
        return None
    of_image = torch.tensor([image["boxes"] for image in images])
    limit = of_image.repeat_interleave(torch.tensor([image["rows"] for image in images]))
    if ((tensors["pairing"] < 0) | (tensors["pairing"] >= limit[:, None])).any():
        return "pairing names boxes that are not there"
    return None


class _Shard:
    """Images that become one shard. What is large of them stands in buffers, which are used again for other images.

    From a GPU the copies go into pinned memory, behind what the host has queued there, and nobody waits for them but
    `keep_finite`.
    """

    def __init__(self, rows: int) -> None:
        self.images: list[FeatureBatch] = []
        self.rows = 0
        self._room = rows + LARGEST_IMAGE
        self._buffers: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def has_room(self, rows: int) -> bool:
        return not self.images or self.rows + rows <= self._room

    def add(self, batch: FeatureBatch) -> None:
        pairs = batch.pairs
        moved = {k: _to_cpu(getattr(pairs, k)) for k in ("size", "boxes", "scores", "classes", "pairing")}
        own = {k: _to_cpu(getattr(batch, k)) for k in ("gt_boxes", "gt_hoi")}
        large = {k: self._buffered(k, getattr(batch, k)) for k in LARGE}
        if batch.adapter_feat.is_cuda:
            self._copied = self._copied or torch.cuda.Event(blocking=True)  # who waits for it shall not spin
            self._copied.record(torch.cuda.current_stream(batch.adapter_feat.device))
        kept = Pairs(pairs.image, pairs.batch_index, **moved)
        self.images.append(FeatureBatch(index=batch.index, pairs=kept, text=None, **own, **large))
        self.rows += len(pairs)

    def _buffered(self, name: str, value: Tensor) -> Tensor:
        begin, end, width = self.rows, self.rows + len(value), value.shape[1]
        found = self._buffers.get(name)
        if found is None or (begin == 0 and (end > len(found) or found.shape[1] != width)):
            room = max(self._room, end)
            found = torch.empty(room, width, dtype=LARGE[name], pin_memory=value.is_cuda)
            self._buffers[name] = found
        return found[begin:end].copy_(value, non_blocking=True)

    def keep_finite(self) -> str | None:
        """Drop the first image that could not be read back, and what is after it; returns what is wrong with it, or None."""
        if self._copied is not None:
            self._copied.synchronize()
        for number, batch in enumerate(self.images):
            problem = _not_finite(batch)
            if problem:
                del self.images[number:]
                self.rows = sum(len(kept.pairs) for kept in self.images)
                return problem
        return None

    def clear(self) -> None:
        """Make room for other images."""
        self.images, self.rows = [], 0

    def tensors(self) -> dict[str, Tensor]:
        """What stands in a shard's file."""
        images = self.images
        return {
            **{name: buffer[: self.rows] for name, buffer in self._buffers.items()},
            "pairing": torch.cat([b.pairs.pairing.T for b in images]).to(torch.int32),
            "objects": torch.cat([b.pairs.objects for b in images]).to(torch.int32),
            "boxes": torch.cat([b.pairs.boxes for b in images]).float(),
            "scores": torch.cat([b.pairs.scores for b in images]).float(),
            "classes": torch.cat([b.pairs.classes for b in images]).to(torch.int32),
            "sizes": torch.stack([b.pairs.size for b in images]).to(torch.int32),
            "gt_boxes": torch.cat([b.gt_boxes.transpose(0, 1) for b in images]).float(),
            "gt_hoi": torch.cat([b.gt_hoi for b in images]).to(torch.int32),
        }


def _to_cpu(x: Tensor) -> Tensor:
    return x.to("cpu", copy=True, non_blocking=x.is_cuda)  # from a GPU this is pinned memory, too


def _not_finite(batch: FeatureBatch) -> str | None:
    """What of an image could not be read back, or None."""
    if not torch.isfinite(batch.adapter_feat).all():
        return f"image {batch.image} gave features that are not finite: does the bare host score it?"
    for name, value in (
        ("logits", batch.logits),
        ("boxes", batch.pairs.boxes),
        ("scores", batch.pairs.scores),
        ("gt_boxes", batch.gt_boxes),
    ):
        if not torch.isfinite(value).all():
            return f"image {batch.image} has {name} that are not finite: does the bare host score it? Look at its annotation"
    return None


def _image_entry(batch: FeatureBatch) -> dict[str, Any]:
    counts = {"rows": len(batch.pairs), "boxes": len(batch.pairs.boxes), "annotations": len(batch.gt_hoi)}
    return {"index": batch.index, "name": batch.image, **counts}

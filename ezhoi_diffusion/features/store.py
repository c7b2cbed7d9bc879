"""A folder of captured features: sharded safetensors with an index, written as a stream.

    meta.json            what was captured, from which host (written first)
    host.safetensors     text features and tables that the host's score needs
    shard-000-00000.*    .safetensors rows of some images; .json names them and is what makes the shard count
    index.json           the shards in order, and the totals (written last: without it the store is unfinished)

Rows are in the order of the split's images, whatever the number of processes that captured them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.batch import FeatureBatch, Pairs
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.files import read_json, read_tensors, sha256, write_json, write_tensors

SCHEMA = 2
ROWS_PER_SHARD = (
    16_384  # 32 MiB of features at D = 512: what a killed capture loses at most, and what it keeps in memory
)
AGAIN = "capture it again, into a new folder"


class FeatureStoreError(EzhoiDiffusionError):
    """A feature folder is missing, unfinished, damaged, or not what was asked for."""


class FeatureWriter:
    """Writes the part of a store that one process captures; finish with `finish_store` on one process.

    Opening a folder that holds an unfinished capture of the same host and split goes on after its last whole shard:
    images before `next_index` are there already, and adding them again does nothing. Raises FeatureStoreError where the folder holds anything else.
    """

    def __init__(
        self, folder: Path, meta: dict[str, Any], *, rank: int = 0, rows_per_shard: int = ROWS_PER_SHARD
    ) -> None:
        self.folder = folder
        self.rank = rank
        self.rows_per_shard = rows_per_shard
        meta = {"schema": SCHEMA, **meta}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "index.json").exists():
                raise FeatureStoreError(f"{folder} holds a finished capture already: give another folder, or delete it")
            if (folder / "meta.json").exists():
                _require_same(folder, read_json(folder / "meta.json", FeatureStoreError, AGAIN), meta)
            elif rank == 0:
                if any(folder.iterdir()):
                    raise FeatureStoreError(f"{folder} is not empty and holds no capture: give another folder")
                write_json(folder / "meta.json", meta)
        except OSError as error:
            raise FeatureStoreError(
                f"{folder} cannot be written ({error}): choose a folder you can write to"
            ) from error
        self._shards = [read_json(p, FeatureStoreError, AGAIN) for p in sorted(folder.glob(f"shard-{rank:03d}-*.json"))]
        self.next_index = self._shards[-1]["images"][-1]["index"] + 1 if self._shards else 0
        self._pending: list[FeatureBatch] = []
        self._rows = 0

    def add(self, batch: FeatureBatch) -> None:
        """Append one image. Raises FeatureStoreError where a value is not finite or the disk refuses."""
        if batch.index < self.next_index:
            return
        if not torch.isfinite(batch.adapter_feat).all():
            raise FeatureStoreError(
                f"image {batch.image} gave features that are not finite: does the bare host score it?"
            )
        self._pending.append(_to_cpu(batch))
        self.next_index = batch.index + 1
        self._rows += len(batch.pairs)
        if self._rows >= self.rows_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard."""
        if not self._pending:
            return
        name = f"shard-{self.rank:03d}-{len(self._shards):05d}"
        try:
            written = write_tensors(self.folder / f"{name}.safetensors", _stack(self._pending))
            shard = {**written, "rows": self._rows, "images": [_image_entry(batch) for batch in self._pending]}
            write_json(self.folder / f"{name}.json", shard)
        except OSError as error:
            raise FeatureStoreError(
                f"{self.folder} could not take {name} ({error}): free space there and give the same command again; "
                f"what was captured so far is kept"
            ) from error
        self._shards.append(shard)
        self._pending, self._rows = [], 0


def write_host_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write what the host's score needs beside the features."""
    write_tensors(folder / "host.safetensors", tensors)


def finish_store(folder: Path) -> FeatureStore:
    """Merge the shards of all processes into the index, and open the store."""
    shards = [read_json(path, FeatureStoreError, AGAIN) for path in sorted(folder.glob("shard-*.json"))]
    if not any(shard["rows"] for shard in shards):
        raise FeatureStoreError(
            f"{folder}: no image had a human-object pair, so there is nothing to store: is --pretrained the right detector?"
        )
    totals = {"rows": sum(s["rows"] for s in shards), "images": sum(len(s["images"]) for s in shards)}
    write_json(folder / "index.json", {"schema": SCHEMA, **totals, "shards": shards})
    return FeatureStore(folder)


class FeatureStore:
    """Reads a finished store. Raises FeatureStoreError where it is missing, unfinished or damaged."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / "index.json").is_file():
            what = (
                "is unfinished: give the capture command again"
                if (self.folder / "meta.json").is_file()
                else (
                    "holds no captured features: make them with `ezhoi-diffusion run main_tip_finetune.py … --plugin capture "
                    "--capture DIR`"
                )
            )
            raise FeatureStoreError(f"{self.folder} {what}")
        self.meta = read_json(self.folder / "meta.json", FeatureStoreError, AGAIN)
        self.index = read_json(self.folder / "index.json", FeatureStoreError, AGAIN)
        for value, file in ((self.meta, "meta.json"), (self.index, "index.json")):
            if value.get("schema") != SCHEMA:
                raise FeatureStoreError(
                    f"{self.folder / file} has schema {value.get('schema')}, this version reads {SCHEMA}: {AGAIN}"
                )
        try:
            self._check()
        except (AttributeError, KeyError, TypeError) as error:
            raise FeatureStoreError(
                f"{self.folder} is damaged ({type(error).__name__}: {error} in meta.json, index.json or host.safetensors); {AGAIN}"
            ) from error

    def _check(self) -> None:
        """Sizes, and the presence of what the properties below hand out."""
        self.host = read_tensors(self.folder / "host.safetensors", FeatureStoreError, AGAIN)
        _ = self.text, self.split, self.fingerprint, len(self)
        for image in self.images:
            _ = image["name"], image["rows"]
        for shard in self.index["shards"]:
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                raise FeatureStoreError(f"{path} has {size} bytes where the index says {shard['bytes']}; {AGAIN}")

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
        """The tensors of each shard in order; contents are checked against the index's SHA-256."""
        for shard in self.index["shards"]:
            path = self.folder / shard["file"]
            if sha256(path) != shard["sha256"]:
                raise FeatureStoreError(f"{path} was changed after it was captured; {AGAIN}")
            yield read_tensors(path, FeatureStoreError, AGAIN)

    def adapter_feat(self) -> Tensor:
        """[N, D] float32, all rows."""
        return self.rows("adapter_feat")

    def rows(self, name: str) -> Tensor:
        """One tensor of the shards over all rows (or boxes, or annotations), concatenated on dim 0."""
        found = [shard[name] for shard in self.shards()]
        return torch.cat(found) if found else torch.zeros((0, self.text.shape[1]))

    def image_index(self) -> Tensor:
        """[N] int64, for each row the position of its image in `images`."""
        counts = torch.tensor([image["rows"] for image in self.images], dtype=torch.long)
        return torch.repeat_interleave(torch.arange(len(counts)), counts)

    def statistics(self) -> ModalityStatistics:
        """Means over all rows and over the text features, as a stream. Raises FeatureStoreError without rows."""
        try:
            return ModalityStatistics.of((shard["adapter_feat"] for shard in self.shards()), self.text)
        except ValueError as error:
            raise FeatureStoreError(f"{self.folder}: {error}; capture a split whose images have pairs") from error


def _require_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if changed:
        listed = "; ".join(f"{key}: there {old.get(key)!r}, now {new.get(key)!r}" for key in changed)
        raise FeatureStoreError(
            f"{folder} holds an unfinished capture of something else ({listed:.600}): give another folder"
        )


def _to_cpu(batch: FeatureBatch) -> FeatureBatch:
    pairs = batch.pairs
    moved = {k: getattr(pairs, k).cpu() for k in ("size", "boxes", "scores", "classes", "pairing")}
    own = {k: getattr(batch, k).cpu() for k in ("adapter_feat", "logits", "labels", "gt_boxes", "gt_hoi")}
    return FeatureBatch(index=batch.index, pairs=Pairs(pairs.image, pairs.batch_index, **moved), text=None, **own)


def _stack(batches: list[FeatureBatch]) -> dict[str, Tensor]:
    return {
        "adapter_feat": torch.cat([b.adapter_feat for b in batches]).float(),
        "logits": torch.cat([b.logits for b in batches]).float(),
        "pairing": torch.cat([b.pairs.pairing.T for b in batches]).to(torch.int32),
        "objects": torch.cat([b.pairs.objects for b in batches]).to(torch.int32),
        "labels": torch.cat([b.labels for b in batches]).to(torch.bool),
        "boxes": torch.cat([b.pairs.boxes for b in batches]).float(),
        "scores": torch.cat([b.pairs.scores for b in batches]).float(),
        "classes": torch.cat([b.pairs.classes for b in batches]).to(torch.int32),
        "sizes": torch.stack([b.pairs.size for b in batches]).to(torch.int32),
        "gt_boxes": torch.cat([b.gt_boxes.transpose(0, 1) for b in batches]).float(),
        "gt_hoi": torch.cat([b.gt_hoi for b in batches]).to(torch.int32),
    }


def _image_entry(batch: FeatureBatch) -> dict[str, Any]:
    counts = {"rows": len(batch.pairs), "boxes": len(batch.pairs.boxes), "annotations": len(batch.gt_hoi)}
    return {"index": batch.index, "name": batch.image, **counts}

"""A folder of captured features: sharded safetensors with an index.

    meta.json                      what was captured, from which run (written first)
    ezhoi.safetensors              text features and tables that EZ-HOI's score needs
    shard-000-00000.safetensors    features of some images
    index.json                     meta, totals, the shards in order, sizes and checksums (written last: without it the
                                   store is unfinished)

During a capture, a .safetensors file counts once the .json with its size and checksum is beside it. Features are in the order
of the split's images, whatever the number of processes. An imported store has fewer tensors; to ask for another is a typed
error. Its text_mean may be known without text features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.contents import ezhoi_problem, shard_problem
from ezhoi_diffusion.features.statistics import ModalityStatistics, unit_mean
from ezhoi_diffusion.files import read_json, read_tensors
from ezhoi_diffusion.schema import Count, FileFacts

SCHEMA = 2
META, INDEX, EZHOI = "meta.json", "index.json", "ezhoi.safetensors"
AGAIN = "capture again into a new folder"
COUNTED_BY = {  # the tensors of a shard that do not have one entry for each pair
    "sizes": "images", "boxes": "boxes", "scores": "boxes", "classes": "boxes", "gt_boxes": "annotations", "gt_hoi": "annotations",
}  # fmt: skip


class StoreMeta(TypedDict):
    """meta.json: what was captured, from which run."""

    schema: Literal[2]
    split: Literal["train", "test"]
    fingerprint: dict[str, Any]
    max_images: NotRequired[Count | None]
    clip_img_file: NotRequired[str | None]
    processes: NotRequired[Count]
    package: NotRequired[str]
    interactions: NotRequired[list[str] | None]
    imported: NotRequired[dict[str, Any]]


class ImageEntry(TypedDict):
    """One image of a shard, and how many of its pairs, boxes and annotations are there."""

    index: Count
    name: str | None
    rows: Count
    boxes: Count
    annotations: Count


class ShardEntry(FileFacts):
    """One shard, in index.json or beside the file."""

    file: Annotated[str, msgspec.Meta(pattern=r"^shard-\d{3}-\d{5}\.safetensors\Z")]
    rows: Count
    images: Annotated[list[ImageEntry], msgspec.Meta(min_length=1)]


class StoreIndex(TypedDict):
    """index.json."""

    schema: Literal[2]
    rows: Annotated[int, msgspec.Meta(ge=1)]
    images: Count
    meta: StoreMeta
    ezhoi: FileFacts
    shards: Annotated[list[ShardEntry], msgspec.Meta(min_length=1)]


class FeatureStoreError(EzhoiDiffusionError):
    """A feature folder is missing, unfinished, damaged, or of another kind than needed."""


def is_captured(folder: Path, meta: dict[str, Any]) -> bool:
    """Whether a folder holds the finished capture that `meta` describes. Raises FeatureStoreError if it is damaged."""
    return (folder / INDEX).exists() and FeatureStore(folder).meta == {"schema": SCHEMA, **meta}


class FeatureStore:
    """A finished store. Raises FeatureStoreError where it is missing, unfinished or damaged."""

    _is_to_learn_from = False
    _whole: FeatureStore | None = None  # what a view is a part of

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            what = (
                "is unfinished: run the capture command again"
                if (self.folder / META).is_file()
                else (
                    "holds no captured features: capture them with `ezhoi-diffusion run main_tip_finetune.py … --plugin capture "
                    "--capture DIR`"
                )
            )
            raise FeatureStoreError(f"{self.folder} {what}")
        self.index = read_json(self.folder / INDEX, StoreIndex, FeatureStoreError, AGAIN)
        self.meta = read_json(self.folder / META, StoreMeta, FeatureStoreError, AGAIN)
        if self.meta != self.index["meta"]:
            raise FeatureStoreError(f"{self.folder / META} belongs to another capture than {INDEX}; {AGAIN}")
        shards, images = self.index["shards"], self.images
        if [image["index"] for image in images] != list(range(len(images))):
            raise FeatureStoreError(f"{self.folder / INDEX}: images are missing or not in order; {AGAIN}")
        totals = {"rows": sum(shard["rows"] for shard in shards), "images": len(images)}
        for problem in [counts_problem(shard) for shard in shards] + [
            f"it has {self.index[key]} {key}, its shards {total}"
            for key, total in totals.items()
            if self.index[key] != total
        ]:
            if problem:
                raise FeatureStoreError(f"{self.folder / INDEX}: {problem}; {AGAIN}")
        for shard in shards:
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                raise FeatureStoreError(f"{path} has {size} bytes where {INDEX} says {shard['bytes']}; {AGAIN}")
        self.ezhoi = read_ezhoi_tensors(self.folder, self.index["ezhoi"], imported=self.imported is not None)

    def __len__(self) -> int:
        return int(self.index["rows"])

    @property
    def split(self) -> str:
        """`train` or `test`."""
        return str(self.meta["split"])

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint of the run, as JSON."""
        return dict(self.meta["fingerprint"])

    @property
    def text(self) -> Tensor:
        """[N_sel, D] float32, the text features that EZ-HOI multiplied with, or of `to_learn_from` some of them."""
        text = self.ezhoi["text"]
        return text[self.learnable_texts()] if self._is_to_learn_from else text

    def learnable_texts(self) -> Tensor:
        """[N_sel] bool, the text features that may be learned from.

        They are all, unless EZ-HOI ran with --without_unseen_name. Its training then has no name of a hidden interaction, while
        its evaluation, and so the capture, has them all.

        Raises:
            FeatureStoreError: The store does not say whose text is whose.
        """
        text, unseen, options = self.ezhoi["text"], self.ezhoi.get("classes/unseen"), self.fingerprint.get("options")
        if unseen is None or not isinstance(options, dict) or not options.get("without_unseen_name"):
            return torch.ones(len(text), dtype=torch.bool, device=text.device)
        interaction = self.ezhoi.get("text_interaction")
        if interaction is None:
            raise FeatureStoreError(
                f"{self.folder}: EZ-HOI ran with --without_unseen_name, so that nothing may be learned from the names of hidden "
                f"interactions, and the store does not say which text features those are; {AGAIN}"
            )
        return ~torch.isin(interaction, unseen)

    def to_learn_from(self) -> FeatureStore:
        """A view whose `text` and `statistics` leave out what is not in `learnable_texts`. Raises FeatureStoreError.

        The tables in `ezhoi` stay whole, as EZ-HOI's evaluation scores with them.
        """
        view = copy.copy(self)
        view._is_to_learn_from = not bool(self.learnable_texts().all())
        return view

    def require_all_texts(self, what: str) -> None:
        """Raise FeatureStoreError where some text may not be learned from. `what` begins the reason: "… hidden interactions"."""
        if not self.learnable_texts().all():
            raise FeatureStoreError(
                f"{self.folder}: EZ-HOI ran with --without_unseen_name, and {what} the names of hidden interactions: choose "
                f"another bridge, or capture a run without that flag"
            )

    @property
    def context(self) -> dict[str, Tensor]:
        """Context vectors of the run."""
        return {name.removeprefix("context/"): t for name, t in self.ezhoi.items() if name.startswith("context/")}

    @cached_property
    def images(self) -> list[dict[str, Any]]:
        """One entry for each image in order: index, name, rows, boxes, annotations."""
        return [image for shard in self.index["shards"] for image in shard["images"]]

    def shards(self) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of each shard in order. Raises FeatureStoreError where one was changed."""
        for number in range(len(self.index["shards"])):
            yield self._read_shard(number)

    def _read_shard(self, number: int) -> dict[str, Tensor]:
        """Read the file of a shard of `root`, whole. Raises FeatureStoreError where it was changed."""
        root = self._root
        shard = root.index["shards"][number]
        path = self.folder / shard["file"]
        tensors = read_tensors(path, shard, FeatureStoreError, AGAIN)
        problem = shard_problem(tensors, shard["images"], root.ezhoi, imported=root.imported is not None)
        if problem:
            raise FeatureStoreError(f"{path}: {problem}; {AGAIN}")
        return tensors

    @property
    def _root(self) -> FeatureStore:
        """The store with the files: itself, unless it is a view."""
        return self if self._whole is None else self._whole._root

    def positions(self) -> Tensor:
        """[N] int64, the position of each pair among all pairs of `root`."""
        return torch.arange(len(self)) if self._whole is None else self._whole.positions()

    def adapter_feat(self) -> Tensor:
        """[N, D] float32, all pair features."""
        return self.rows("adapter_feat")

    def rows(self, name: str) -> Tensor:
        """Concatenate one tensor of all shards: one entry for each pair, box or annotation."""
        counts = COUNTED_BY.get(name, "rows")
        number = len(self.images) if counts == "images" else sum(image[counts] for image in self.images)
        found, begin = self.text.new_empty(0), 0
        for shard in self.shards():
            self._require(name, shard)
            part = shard[name]
            if not begin:  # room for all at once: to join parts would take twice as much
                found = part.new_empty(number, *part.shape[1:])
            found[begin : begin + len(part)] = part
            begin += len(part)
        return found

    @property
    def imported(self) -> dict[str, Any] | None:
        """Origin of features that this package did not capture, or None."""
        found: dict[str, Any] | None = self.meta.get("imported")
        return found

    def require_training_images(self, what: str) -> None:
        """Raise FeatureStoreError unless the store holds training images. `what` begins the reason: "… training images only"."""
        if self.split != "train":
            raise FeatureStoreError(
                f"{self.folder} holds the {self.split} split: {what} training images only; capture those with --capture-split train"
            )

    def require_captured(self, what: str) -> None:
        """Raise FeatureStoreError in an imported store, which does not know `what`."""
        if self.imported is not None:
            raise FeatureStoreError(
                f"{self.folder} was imported, and {what} is not in its source files: capture the features with "
                f"`ezhoi-diffusion run main_tip_finetune.py … --plugin capture --capture DIR`"
            )

    def _require(self, name: str, shard: dict[str, Tensor]) -> None:
        if name not in shard:
            self.require_captured(f"'{name}'")

    def image_index(self) -> Tensor:
        """[N] int64, the position in `images` of each pair's image."""
        counts = torch.tensor([image["rows"] for image in self.images], dtype=torch.long)
        return torch.repeat_interleave(torch.arange(len(counts)), counts)

    def subset(self, images: Iterable[int], hidden: Tensor | None = None) -> FeatureStore:
        """A view of some images, as if only they had been captured, in a run that hides more interactions.

        Args:
            images: Positions of the images that stay.
            hidden: Interaction classes [k] that become unseen too, so that no fit uses their labels.

        Raises:
            FeatureStoreError: No image with a pair stays.
        """
        return _Subset(self, set(images), torch.zeros(0, dtype=torch.long) if hidden is None else hidden)

    @property
    def text_mean(self) -> Tensor:
        """[D] float32, the mean of the unit text features. Raises ValueError where there is neither text nor its mean."""
        return self.ezhoi["text_mean"] if "text_mean" in self.ezhoi else unit_mean(self.text)

    def statistics(self) -> ModalityStatistics:
        """Compute the means of pair and text features as a stream. Raises FeatureStoreError without pair features."""
        blocks = (shard["adapter_feat"] for shard in self.shards())
        try:
            return ModalityStatistics.compute_with_text_mean(blocks, self.text_mean, len(self.text))
        except ValueError as error:
            raise FeatureStoreError(f"{self.folder}: {error}; capture a split whose images have pairs") from error


class _Subset(FeatureStore):
    """What `subset` returns. It reads the shards of `whole`, and keeps the rows of its own images."""

    def __init__(self, whole: FeatureStore, images: set[int], hidden: Tensor) -> None:
        self.folder, self._is_to_learn_from = whole.folder, whole._is_to_learn_from
        self._whole: FeatureStore = whole
        self._masks: list[Tensor] = []  # [n] bool for each shard of `whole`: the images that stay
        shards, position, number = [], 0, 0
        for shard in whole.index["shards"]:
            stays = [position + offset in images for offset in range(len(shard["images"]))]
            position += len(stays)
            self._masks.append(torch.tensor(stays))
            kept = [image for image, is_kept in zip(shard["images"], stays, strict=True) if is_kept]
            kept = [{**image, "index": number + offset} for offset, image in enumerate(kept)]
            number += len(kept)
            if kept:
                shards.append({**shard, "images": kept, "rows": sum(image["rows"] for image in kept)})
        rows = sum(shard["rows"] for shard in shards)
        if not rows:
            raise FeatureStoreError(f"{self.folder}: none of {number} chosen images has a pair; choose more images")
        self.meta = {**whole.meta, "max_images": number}
        self.index = {**whole.index, "meta": self.meta, "shards": shards, "rows": rows, "images": number}
        self.ezhoi = dict(whole.ezhoi)
        if len(hidden):
            full = self.ezhoi["classes/full"]
            unseen = torch.cat([self.ezhoi.get("classes/unseen", full[:0]), hidden]).unique()
            self.ezhoi |= {"classes/unseen": unseen, "classes/seen": full[~torch.isin(full, unseen)]}

    def shards(self) -> Iterator[dict[str, Tensor]]:
        counts = ("rows", "boxes", "annotations")
        for shard, stays, tensors in zip(self._whole.index["shards"], self._masks, self._whole.shards(), strict=True):
            if not stays.any():
                continue
            of_image = {key: torch.tensor([image[key] for image in shard["images"]]) for key in counts}
            masks = {key: stays.repeat_interleave(count) for key, count in of_image.items()} | {"images": stays}
            yield {name: tensor[masks[COUNTED_BY.get(name, "rows")]] for name, tensor in tensors.items()}

    def positions(self) -> Tensor:
        return self._whole.positions()[torch.cat(self._masks)[self._whole.image_index()]]


def read_ezhoi_tensors(folder: Path, facts: dict[str, Any], *, imported: bool) -> dict[str, Tensor]:
    """Read ezhoi.safetensors. Raises FeatureStoreError where it was changed, or is not what EZ-HOI's score needs."""
    tensors = read_tensors(folder / EZHOI, facts, FeatureStoreError, AGAIN)
    problem = ezhoi_problem(tensors, imported=imported)
    if problem:
        raise FeatureStoreError(f"{folder / EZHOI}: {problem}; {AGAIN}")
    return tensors


def counts_problem(shard: Mapping[str, Any]) -> str | None:
    """The problem with an index entry whose counts do not add up, or cannot be those of the file, or None."""
    counts = {key: sum(image[key] for image in shard["images"]) for key in ("rows", "boxes", "annotations")}
    if shard["rows"] != counts["rows"]:
        return f"{shard['file']} has {shard['rows']} rows, its images {counts['rows']}"
    if sum(counts.values()) > shard["bytes"]:  # each takes more than a byte, and these numbers size tensors
        return f"{shard['file']} has {shard['bytes']} bytes, too few for {counts}"
    return None

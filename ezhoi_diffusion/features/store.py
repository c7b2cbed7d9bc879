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
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.files import read_json, read_tensors

SCHEMA = 2
META, INDEX, EZHOI = "meta.json", "index.json", "ezhoi.safetensors"
AGAIN = "capture again into a new folder"
SHARD = re.compile(r"shard-(\d{3})-(\d{5})\.safetensors")
COUNTED_BY = {  # the tensors of a shard that do not have one entry for each pair
    "sizes": "images", "boxes": "boxes", "scores": "boxes", "classes": "boxes", "gt_boxes": "annotations", "gt_hoi": "annotations",
}  # fmt: skip


class FeatureStoreError(EzhoiDiffusionError):
    """A feature folder is missing, unfinished, damaged, or of another kind than needed."""


def is_captured(folder: Path, meta: dict[str, Any]) -> bool:
    """Whether a folder holds the finished capture that `meta` describes. Raises FeatureStoreError if it is damaged."""
    return (folder / INDEX).exists() and FeatureStore(folder).meta == {"schema": SCHEMA, **meta}


class FeatureStore:
    """A finished store. Raises FeatureStoreError where it is missing, unfinished or damaged."""

    _is_to_learn_from = False

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
        self.index = read_json(self.folder / INDEX, FeatureStoreError, AGAIN)
        try:
            self._check()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FeatureStoreError(
                f"{self.folder} is damaged ({type(error).__name__}: {error} in {META}, {INDEX} or {EZHOI}); {AGAIN}"
            ) from error

    def _check(self) -> None:
        """Check everything but the shards, which `shards` checks when it reads them."""
        self.meta = read_json(self.folder / META, FeatureStoreError, AGAIN)
        for value, file in ((self.meta, META), (self.index, INDEX)):
            if value.get("schema") != SCHEMA:
                raise FeatureStoreError(
                    f"{self.folder / file} has schema {value.get('schema')}, this version reads {SCHEMA}: {AGAIN}"
                )
        if self.meta != self.index["meta"]:
            raise FeatureStoreError(f"{self.folder / META} belongs to another capture than {INDEX}; {AGAIN}")
        self.ezhoi = read_tensors(self.folder / EZHOI, self.index["ezhoi"], FeatureStoreError, AGAIN)
        require(self.split in ("train", "test"), f"the split is {self.split!r}")
        require(isinstance(self.meta["fingerprint"], dict), "the fingerprint is not an object")
        imported = self.imported is not None
        require(self.text.ndim == 2 and (imported or self.text.numel() > 0), f"text has shape {list(self.text.shape)}")
        require(self.text.dtype == torch.float32, f"text is {self.text.dtype}")
        for shard in self.index["shards"]:
            require(SHARD.fullmatch(shard["file"]), f"{shard['file']!r} is not a name of a shard")
            require_counts(shard)
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                raise FeatureStoreError(f"{path} has {size} bytes where the index says {shard['bytes']}; {AGAIN}")
        images = self.images
        require([i["index"] for i in images] == list(range(len(images))), "images are missing or not in order")
        require(len(self) == sum(image["rows"] for image in images) > 0, f"rows is {self.index['rows']}")
        require(self.index["images"] == len(images), f"images is {self.index['images']}")

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
            return torch.ones(len(text), dtype=torch.bool)
        interaction = self.ezhoi.get("text_interaction")
        if interaction is None or interaction.dtype != torch.int64 or interaction.shape != text.shape[:1]:
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

    @property
    def images(self) -> list[dict[str, Any]]:
        """One entry for each image in order: index, name, rows, boxes, annotations."""
        return [image for shard in self.index["shards"] for image in shard["images"]]

    def shards(self) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of each shard in order. Raises FeatureStoreError where one was changed."""
        for shard in self.index["shards"]:
            path = self.folder / shard["file"]
            tensors = read_tensors(path, shard, FeatureStoreError, AGAIN)
            problem = _rows_problem(tensors, shard, self.text.shape[1], imported=self.imported is not None)
            if problem:
                raise FeatureStoreError(f"{path}: {problem}; {AGAIN}")
            yield tensors

    def adapter_feat(self) -> Tensor:
        """[N, D] float32, all pair features."""
        return self.rows("adapter_feat")

    def rows(self, name: str) -> Tensor:
        """Concatenate one tensor of all shards: one entry for each pair, box or annotation."""
        return torch.cat([shard[name] for shard in self.shards() if self._require(name, shard)])

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

    def _require(self, name: str, shard: dict[str, Tensor]) -> bool:
        if name not in shard:
            self.require_captured(f"'{name}'")
        return True

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

    def statistics(self) -> ModalityStatistics:
        """Compute the means of pair and text features as a stream. Raises FeatureStoreError without pair features."""
        blocks = (shard["adapter_feat"] for shard in self.shards())
        try:
            if "text_mean" in self.ezhoi:
                return ModalityStatistics.compute_with_text_mean(blocks, self.ezhoi["text_mean"], len(self.text))
            return ModalityStatistics.compute(blocks, self.text)
        except ValueError as error:
            raise FeatureStoreError(f"{self.folder}: {error}; capture a split whose images have pairs") from error


class _Subset(FeatureStore):
    """What `subset` returns. It reads the shards of `whole`, and keeps the rows of its own images."""

    def __init__(self, whole: FeatureStore, images: set[int], hidden: Tensor) -> None:
        self.folder, self._whole, self._is_to_learn_from = whole.folder, whole, whole._is_to_learn_from
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


def require(holds: object, what: str) -> None:
    """Raise ValueError(`what`) unless `holds`."""
    if not holds:
        raise ValueError(what)


def require_counts(shard: dict[str, Any]) -> None:
    """Raise ValueError, TypeError or KeyError unless an index entry has images whose counts add up."""
    for image in shard["images"]:
        counts = [image[key] for key in ("index", "rows", "boxes", "annotations")]
        require(all(type(n) is int and n >= 0 for n in counts), f"an image has the counts {counts}")
        require(image["name"] is None or isinstance(image["name"], str), f"an image has the name {image['name']!r}")
    rows = sum(image["rows"] for image in shard["images"])
    require(shard["images"] and shard["rows"] == rows, f"{shard['file']} has {shard['rows']!r} rows, its images {rows}")


def _rows_problem(tensors: dict[str, Tensor], shard: dict[str, Any], dim: int, *, imported: bool) -> str | None:
    """Compare the tensors of a shard with its index entry and the text's width. Returns the first problem, or None.

    An imported shard may lack all but adapter_feat.
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
        return "pairing names boxes that do not exist"
    return None

"""Captured features: whole, of the right images, and good enough to train a bridge."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from ezhoi_diffusion.doctor import statistics
from ezhoi_diffusion.doctor.finding import CAPTURE, Finding, Level, ok
from ezhoi_diffusion.features.fingerprint import Fingerprint
from ezhoi_diffusion.features.rows import StoredRows
from ezhoi_diffusion.features.statistics import ModalityStatistics, mean_resultant_lengths
from ezhoi_diffusion.features.store import FeatureStore

AGAIN = f"capture again, into a new folder: {CAPTURE}"
MIN_PAIRS = 15  # EZ-HOI keeps at least 3 humans and 3 objects: 3 · (3 + 3 − 1) pairs
MAX_COMMON = 0.4  # mean resultant length; measured: 0.10-0.16 after the own mean, 0.57-0.71 after the text mean
TEXT_MEAN_NORM = (0.7, 0.9)


@dataclass(frozen=True)
class Contents:
    """What was found in the shards.

    Attributes:
        features: All pair features [N, D], on disk.
        norms: Their norms [N].
        distinct: How many differ.
        statistics: Their means.
        shared: `mean_resultant_lengths` after the visual mean, and after the text mean.
        labelled: The interaction classes that occur in annotations and labels.
    """

    features: StoredRows
    norms: Tensor
    distinct: int
    statistics: ModalityStatistics
    shared: tuple[float, float]
    labelled: set[int]


def is_unfinished(folder: Path) -> bool:
    """Whether the folder holds an unfinished capture."""
    return (folder / "meta.json").is_file() and not (folder / "index.json").is_file()


def read_contents(store: FeatureStore) -> Contents:
    """Read every shard twice, with a progress bar, and keep none. Raises FeatureStoreError for a damaged one.

    What features share beyond their mean takes the mean, and so a second pass.
    """
    norms: list[Tensor] = []
    hashes: list[NDArray[np.uint64]] = []  # weighted sums of a feature's bits, modulo 2^64 (Dietzfelbinger, STACS 1996)
    weights = np.random.default_rng(0).integers(0, 2**64, store.text.shape[1], dtype=np.uint64)
    labelled: set[int] = set()
    number = len(store.index["shards"])
    with tqdm(total=2 * number, desc="reading features", unit="shard", file=sys.stderr, disable=None) as progress:

        def first_pass() -> Iterator[Tensor]:
            for shard in store.shards():
                features = shard["adapter_feat"]
                norms.append(features.norm(dim=1))
                hashes.append(np.einsum("nd,d->n", features.numpy().view(np.uint32), weights))
                labelled.update(_labelled_classes(store, shard))
                progress.update()
                yield features

        def second_pass() -> Iterator[Tensor]:
            for shard in store.shards():
                progress.update()
                yield shard["adapter_feat"]

        known = store.to_learn_from()  # as a bridge has its text mean
        found = ModalityStatistics.compute_with_text_mean(first_pass(), known.text_mean, len(known.text))
        own, text = mean_resultant_lengths(second_pass(), (found.visual_mean, found.text_mean))
    in_order = np.sort(np.concatenate(hashes))  # a fifth of the time of numpy's unique
    distinct = 1 + np.count_nonzero(in_order[1:] != in_order[:-1])
    return Contents(StoredRows(store), torch.cat(norms), distinct, found, (own, text), labelled)


def _labelled_classes(store: FeatureStore, shard: dict[str, Tensor]) -> set[int]:
    if store.imported is not None:
        return set()
    found = set(shard["gt_hoi"].tolist())
    everything = store.ezhoi.get("classes/full")
    if everything is not None and shard["labels"].shape[1:] == everything.shape:
        found |= set(shard["labels"].any(dim=0).nonzero().flatten().tolist())
    return found


# -- meta.json ---------------------------------------------------------------------------------------------------


def check_meta(store: FeatureStore) -> Iterator[Finding]:
    """Check what the store says of itself: pairs, split, images, CLIP features, fingerprint, origin."""
    yield _check_pairs(store)
    if store.split == "train":
        yield ok("features.split", "train")
    else:
        yield Finding(
            "features.split", "warning", f"{store.split}: fit to look at a bridge, and refused by training",
            "to train, capture the training images: add --capture-split train, or leave --eval out",
        )  # fmt: skip
    limit = store.meta.get("max_images")
    if limit is None:
        yield ok("features.images", f"the whole {store.split} split, {len(store.images)} images")
    else:
        yield Finding(
            "features.images", "note", f"captured with --max-images {limit}: a part of the split",
            "for results, capture without --max-images, into a new folder",
        )  # fmt: skip
    if store.imported is None:
        yield _check_clip_folder(store.meta, store.split)
    yield _check_fingerprint(store.fingerprint)
    if store.imported is not None:
        raw = "raw_clip" in str(store.imported)
        yield Finding(
            "features.imported", "warning" if raw else "note",
            f"imported{', with text of raw CLIP, which EZ-HOI does not multiply with' if raw else ''}: {store.imported!s:.200}",
            f"use the adapted text features: {AGAIN}" if raw else "a capture of your own adds norms, boxes and labels",
        )  # fmt: skip


def _check_pairs(store: FeatureStore) -> Finding:
    images = len(store.images)
    with_pairs = sum(image["rows"] > 0 for image in store.images)
    mean = len(store) / max(with_pairs, 1)
    found = (
        f"{mean:.1f} pairs in an image that has any ({MIN_PAIRS} or more expected); {images - with_pairs} of {images} images "
        f"have none"
    )
    if mean < MIN_PAIRS or with_pairs < images / 2:
        fix = "is --pretrained a detector for this data set? See also --min-instances and --box-score-thresh"
        return Finding("features.pairs", "warning", found, fix)
    return ok("features.pairs", found)


def _check_clip_folder(meta: dict[str, Any], split: str) -> Finding:
    folder = meta.get("clip_img_file")
    if folder is None:
        return ok("features.clip", "EZ-HOI read no CLIP image features (--img_clip_pt is off)")
    if str(folder).endswith("_test" if split == "train" else "_train"):
        return Finding(
            "features.clip", "problem", f"EZ-HOI read {folder} for the {split} split",
            f"give the {split} split's folder as --clip_img_file, and {AGAIN}",
        )  # fmt: skip
    return ok("features.clip", f"EZ-HOI read {folder}")


def _check_fingerprint(known: dict[str, Any]) -> Finding:
    # without --zs there is no zs_type; False is a value
    empty = [name for name, value in known.items() if value in ("", 0) and value is not False]
    missing = [field.name for field in fields(Fingerprint) if field.name not in known or field.name in empty]
    if missing:
        found = f"lacks {', '.join(missing)}: EZ-HOI runs would refuse a bridge made from these features"
        return Finding("features.fingerprint", "problem", found, AGAIN)
    listed = ", ".join(f"{key} {known[key]}" for key in ("backbone", "dim", "zs_type", "text_rows"))
    return ok("features.fingerprint", f"complete: {listed}")


# -- tensors -----------------------------------------------------------------------------------------------------


def check_text(text: Tensor) -> Finding:
    """Check that the text features [N_sel, D] are distinct and span more than a few directions."""
    name = "features.text"
    if len(text) == 0:
        return Finding(name, "warning", "no text features, only their mean", "import the file of text embeddings too")
    if zero := int((text.norm(dim=1) == 0).sum()):
        fix = f"classes that were not selected do not belong there: {AGAIN}"
        return Finding(name, "problem", f"of {len(text)} text features {zero} are zero", fix)
    distinct = len(text.unique(dim=0))
    if distinct == 1:
        return Finding(name, "problem", f"all {len(text)} text features are equal", f"are the prompts trained? {AGAIN}")
    directions = normalize(text.double(), dim=-1)
    rank = int(torch.linalg.matrix_rank(directions - directions.mean(0), rtol=1e-3))
    found = f"{len(text)} text features, {distinct} distinct, spanning {rank} directions"
    if distinct < len(text) or rank < min(text.shape) / 10:
        fix = "near-equal prompts give near-equal scores: is --resume the checkpoint that belongs to these flags?"
        return Finding(name, "warning", found, fix)
    return ok(name, found)


def check_contents(store: FeatureStore, contents: Contents, out: Path | None) -> Iterator[Finding]:
    """Check values, duplicates, labels and means, and show the statistics.

    Args:
        store: Where the features come from.
        contents: What was read from it.
        out: Where to write statistics.json and statistics.png.
    """
    found = statistics.compute_statistics(store, contents.norms, contents.statistics, contents.shared)
    details = statistics.format_statistics(found)
    if out is not None:
        written = statistics.write_statistics(store, contents.features, contents.norms, found, out)
        details += f"\n         wrote {', '.join(map(str, written))}"
    # the store refuses a shard of another size or checksum, and one that holds NaN or infinity
    whole = f"{len(store.index['shards'])} shards: sizes and checksums are right, all values finite"
    yield ok("features.files", whole, details)
    yield _check_labels(store, contents.labelled)
    yield _check_duplicates(contents.distinct, len(contents.features))
    yield _check_norms(contents.norms)
    yield from _check_means(found)


def _check_norms(norms: Tensor) -> Finding:
    zero = int((norms == 0).sum())
    found = f"min {norms.min():.4g}, median {norms.median():.4g}, max {norms.max():.4g}; {zero} features are zero"
    if zero:
        fix = "EZ-HOI gave these pairs no feature, and a bridge leaves them alone: is --resume a trained checkpoint?"
        return Finding("features.norms", "problem" if zero > len(norms) / 2 else "warning", found, fix)
    if norms.max() > 100 * norms.median():
        return Finding("features.norms", "warning", found, "a few features explode: look at EZ-HOI's checkpoint")
    return ok("features.norms", found)


def _check_duplicates(distinct: int, count: int) -> Finding:
    share = 1 - distinct / count
    found = f"{share:.1%} of the features equal an earlier one"
    if share > 0.01:
        level: Level = "problem" if share > 0.5 else "warning"
        fix = f"were images captured twice, or does EZ-HOI ignore its input? {AGAIN}"
        return Finding("features.duplicates", level, found, fix)
    return ok("features.duplicates", found)


def _check_labels(store: FeatureStore, labelled: set[int]) -> Finding:
    unseen = set(store.ezhoi.get("classes/unseen", torch.zeros(0)).tolist())
    leaked = sorted(unseen & labelled) if store.split == "train" else []
    if leaked:
        return Finding(
            "features.labels", "problem",
            f"{len(leaked)} unseen classes are labelled, e.g. {leaked[0]}: they must not reach training",
            f"with the --zs and --zs_type of the checkpoint, {AGAIN}",
        )  # fmt: skip
    return ok(
        "features.labels",
        f"none of {len(unseen)} unseen classes is labelled" if store.split == "train" else "not for training",
    )


def _check_means(found: dict[str, Any]) -> Iterator[Finding]:
    for side in ("text", "visual"):
        yield _check_mean_norm(side, found[f"{side}_mean_norm"])
    own, text = (found["mean_resultant_length"][f"after_{side}_mean"] for side in ("visual", "text"))
    said = (
        f"what all features share: {own:.2f} after their own mean is subtracted, {text:.2f} after the text mean (of 1)"
    )
    if own > MAX_COMMON:
        fix = f"a few outliers shift the mean: see features.norms and features.duplicates; else {AGAIN}"
        yield Finding("features.centring", "warning", said, fix)
    elif text > MAX_COMMON:
        fix = "take a recipe that subtracts the visual mean (gentle, paper); the guide's subtracts the text mean"
        yield Finding("features.centring", "note", said, fix)
    else:
        yield ok("features.centring", said)


def _check_mean_norm(side: str, norm: float) -> Finding:
    name = f"features.{side}_mean"
    low, high = TEXT_MEAN_NORM
    found = f"norm {norm:.4f}, the root of the mean pairwise cosine"
    if side == "text":
        found += f" ({low}-{high} is usual for CLIP text; the guide's 0.01-0.05 is impossible)"
    if not norm < 0.999:
        fix = f"is --resume a trained checkpoint? {AGAIN}"
        return Finding(name, "problem", f"{found}: all {side} features point the same way", fix)
    if norm < 0.3:
        fix = f"features must be as EZ-HOI computes them, neither centred nor scaled: {AGAIN}"
        return Finding(name, "warning", f"{found}: the {side} features look centred already", fix)
    if side == "text" and not low <= norm <= high:
        return Finding(name, "note", f"{found}: unusual", "nothing, if EZ-HOI was trained; else see --resume")
    return ok(name, found)

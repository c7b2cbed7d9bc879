"""A folder of captured features: whole, of the right images, and such that a bridge can learn from it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ezhoi_diffusion.doctor.finding import CAPTURE, Finding, Level, ok
from ezhoi_diffusion.features.fingerprint import Fingerprint
from ezhoi_diffusion.features.statistics import ModalityStatistics, mean_resultant_length, unit
from ezhoi_diffusion.features.store import FeatureStore

AGAIN = f"capture again, into a new folder: {CAPTURE}"
PAIRS_EXPECTED = 15  # the host keeps at least 3 humans and 3 objects: 3 · (3 + 3 - 1)
SAMPLE = 4096
# Where measured, the mean direction left in a row was .57-.71 without the text mean, and .10-.16 without its own.
COMMON_SHARE = 0.4
TEXT_MEAN_NORM = (0.7, 0.9)


@dataclass
class Scan:
    """What one pass over all rows gives: norms [N], row hashes [N], statistics, a seeded sample [n, D]."""

    statistics: ModalityStatistics | None = None
    norms: list[Tensor] = field(default_factory=list)
    hashes: list[Tensor] = field(default_factory=list)
    sample: list[Tensor] = field(default_factory=list)
    labelled: set[int] = field(default_factory=set)  # interaction classes that occur as labels
    digest: Any = field(default_factory=hashlib.sha256)  # over the bytes of all rows, as training takes it


def scan(store: FeatureStore) -> Scan:
    """Read every shard once, with a progress bar; hashes are checked. Raises FeatureStoreError."""
    result, dim, total = Scan(), store.text.shape[1], len(store)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.randperm(total, generator=generator)[:SAMPLE]] = True
    # odd 64-bit factors: two rows agree in this hash if they are equal, and else with probability 2^-64 or so
    factors = torch.randint(-(2**62), 2**62, (dim,), generator=generator) * 2 + 1
    size = sum(shard["bytes"] for shard in store.index["shards"])
    bar = tqdm(total=size, desc="reading features", unit="B", unit_scale=True, file=sys.stderr, disable=None)

    def blocks() -> Iterator[Tensor]:
        start = 0
        for entry, shard in zip(store.index["shards"], store.shards(), strict=True):
            rows = shard["adapter_feat"].float()
            result.digest.update(rows.contiguous().numpy().tobytes())
            result.norms.append(rows.norm(dim=1))
            result.hashes.append((rows.contiguous().view(torch.int32).long() * factors).sum(1))
            result.sample.append(rows[chosen[start : start + len(rows)]])
            result.labelled |= _labelled(store, shard)
            start += len(rows)
            bar.update(entry["bytes"])
            yield rows

    with bar:
        if "text_mean" in store.ezhoi:
            result.statistics = ModalityStatistics.around(blocks(), store.ezhoi["text_mean"], len(store.text))
        else:
            result.statistics = ModalityStatistics.of(blocks(), store.text)
    return result


def _labelled(store: FeatureStore, shard: dict[str, Tensor]) -> set[int]:
    """Interaction classes that occur in a shard's annotations, and in its labels where those are by interaction."""
    if store.imported is not None:
        return set()
    found = set(shard["gt_hoi"].tolist())
    everything = store.ezhoi.get("classes/full")
    if everything is not None and shard["labels"].shape[1:] == everything.shape:
        found |= set(shard["labels"].any(dim=0).nonzero().flatten().tolist())
    return found


def meta(store: FeatureStore) -> Iterator[Finding]:
    """What the store says of itself: size, split, the images it covers, the CLIP features read, the host."""
    images, split = store.images, store.split
    with_pairs = sum(image["rows"] > 0 for image in images)
    yield ok("features.rows", f"{len(store)} rows of {len(images)} images, D = {store.text.shape[1]}")
    yield _pairs(len(store), len(images), with_pairs)
    if split == "train":
        yield ok("features.split", "train")
    else:
        yield Finding(
            "features.split", "warning", f"{split}: fit for looking at a bridge, and refused by training",
            "to train, capture the training images: add --capture-split train, or leave --eval out",
        )  # fmt: skip
    limit = store.meta.get("max_images")
    if limit is not None:
        yield Finding(
            "features.images", "note", f"captured with --max-images {limit}: a part of the split",
            "for the real thing capture without --max-images, into a new folder",
        )  # fmt: skip
    else:
        yield ok("features.images", f"the whole {split} split, {len(images)} images")
    yield _clip_folder(store.meta, split)
    yield _fingerprint(store)
    if "imported" in store.meta:
        raw = "raw_clip" in str(store.meta["imported"])
        yield Finding(
            "features.imported", "warning" if raw else "note",
            f"imported{', with text features of raw CLIP: not those that EZ-HOI multiplies with' if raw else ''}: "
            f"{store.meta['imported']!s:.200}",
            f"use the adapted text features: {AGAIN}" if raw else "a capture of your own knows more: norms, boxes, labels",
        )  # fmt: skip


def _pairs(rows: int, images: int, with_pairs: int) -> Finding:
    mean = rows / max(with_pairs, 1)
    found = (
        f"{mean:.1f} pairs an image that has any (EZ-HOI keeps 3 humans and 3 objects whatever their score, so expect "
        f"{PAIRS_EXPECTED} and more, 570,000 on HICO-DET's training images), {images - with_pairs} of {images} images have none"
    )
    few = mean < PAIRS_EXPECTED or with_pairs < images / 2
    fix = "is --pretrained a detector for this data set? See also --min-instances and --box-score-thresh" if few else ""
    return Finding("features.pairs", "warning" if few else "ok", found, fix)


def _clip_folder(facts: dict[str, Any], split: str) -> Finding:
    name = "features.clip"
    if "clip_img_file" not in facts:
        return Finding(
            name, "note", "the store does not say which CLIP image features the host read (older versions did not)",
            f"nothing, where --clip_img_file named the {split} split's folder; else {AGAIN}",
        )  # fmt: skip
    folder = facts["clip_img_file"]
    if folder is None:
        return ok(name, "the host read no CLIP image features (--img_clip_pt is off)")
    other = "test" if split == "train" else "train"
    if str(folder).endswith(f"_{other}"):
        return Finding(
            name, "problem", f"the host read {folder} for the {split} split",
            f"give the {split} split's folder as --clip_img_file, and {AGAIN}",
        )  # fmt: skip
    return ok(name, f"the host read {folder}")


def _fingerprint(store: FeatureStore) -> Finding:
    known = store.fingerprint
    # without --zs there is no zs_type; nothing else may be empty, and False is a value
    empty = [name for name, value in known.items() if value is not False and value in ("", 0)]
    missing = [f.name for f in fields(Fingerprint) if f.name not in known or f.name in empty]
    if missing:
        return Finding(
            "features.fingerprint", "problem", f"lacks {', '.join(missing)}: a host would refuse the bridge made from it", AGAIN
        )  # fmt: skip
    what = ", ".join(f"{key} {known[key]}" for key in ("backbone", "dim", "zs_type", "text_rows"))
    return ok("features.fingerprint", f"complete: {what}; {len(store.context)} context vectors")


def rows(store: FeatureStore, found: Scan) -> Iterator[Finding]:
    """Values, norms, duplicates, labels and means of all rows."""
    shards = store.index["shards"]
    size = sum(shard["bytes"] for shard in shards)
    yield ok("features.files", f"{len(shards)} shards, {size / 1e6:.1f} MB, every SHA-256 is right")
    yield ok("features.finite", "no NaN, no infinity")  # a file that holds any is refused when it is read
    yield _duplicates(torch.cat(found.hashes))
    yield _labels(store, found.labelled)
    if found.statistics is not None:
        yield _norms(torch.cat(found.norms))
        yield from means(found.statistics, torch.cat(found.sample))


def _norms(norms: Tensor) -> Finding:
    zero = int((norms == 0).sum())
    low, middle, high = float(norms.min()), float(norms.median()), float(norms.max())
    found = f"least {low:.4g}, median {middle:.4g}, largest {high:.4g}; {zero} rows of norm zero"
    if zero:
        fix = "the host gave these pairs no feature, and a bridge leaves them alone: is --resume a trained checkpoint?"
        return Finding("features.norms", "problem" if zero > len(norms) / 2 else "warning", found, fix)
    if high > 100 * middle:
        return Finding("features.norms", "warning", found, "a few rows explode: look at the host's checkpoint")
    return ok("features.norms", found)


def _duplicates(hashes: Tensor) -> Finding:
    share = 1 - len(hashes.unique()) / len(hashes)
    found = f"{share:.1%} of the rows equal an earlier one"
    if share > 0.01:
        level: Level = "problem" if share > 0.5 else "warning"
        fix = f"were images captured twice, or does the host ignore its input? {AGAIN}"
        return Finding("features.duplicates", level, found, fix)
    return ok("features.duplicates", found)


def _labels(store: FeatureStore, labelled: set[int]) -> Finding:
    name = "features.labels"
    unseen = set(store.ezhoi.get("classes/unseen", torch.zeros(0)).tolist())
    if store.split != "train" or not unseen:
        return ok(name, "no class is held out" if store.split == "train" else "not for training, so of all classes")
    leaked = unseen & labelled
    if leaked:
        return Finding(
            name, "problem", f"{len(leaked)} unseen classes are labelled, e.g. {sorted(leaked)[0]}: they must not reach training",
            f"with the --zs and --zs_type of the checkpoint, {AGAIN}",
        )  # fmt: skip
    return ok(name, f"none of the {len(unseen)} unseen classes is labelled, {len(labelled)} seen ones are")


def means(statistics: ModalityStatistics, sample: Tensor) -> Iterator[Finding]:
    """Norms of both means, their gap, and what a row still shares with all others once a mean is off. sample: [n, D]."""
    visual, text = float(statistics.visual_mean.norm()), float(statistics.text_mean.norm())
    yield _mean_norm("text", text)
    yield _mean_norm("visual", visual)
    yield ok("features.gap", f"distance of the two means {statistics.gap:.3f}")
    share = {
        side: mean_resultant_length([sample], mean)
        for side, mean in (("own", statistics.visual_mean), ("text", statistics.text_mean))
    }
    found = (
        f"after centring, all visual rows still share a vector of norm {share['own']:.2f} with their own mean off, "
        f"{share['text']:.2f} with the text mean off (of 1; .10-.16 and .57-.71 where it was measured before)"
    )
    if share["own"] > COMMON_SHARE:
        fix = f"a few rows far from the rest drag the mean: see features.norms and features.duplicates; else {AGAIN}"
        yield Finding("features.centring", "warning", found, fix)
    elif share["text"] > COMMON_SHARE:
        fix = "take a recipe that takes the visual mean off (gentle, paper); the guide's takes off the text mean, and hurt"
        yield Finding("features.centring", "note", found, fix)
    else:
        yield ok("features.centring", found)


def _mean_norm(side: str, norm: float) -> Finding:
    name = f"features.{side}_mean"
    low, high = TEXT_MEAN_NORM
    what = f"norm {norm:.4f}, the root of the mean pairwise cosine of the {side} rows"
    if side == "text":
        what += f" ({low}-{high} is usual for CLIP text; the guide's 0.01-0.05 is impossible)"
    if not norm < 0.999:
        return Finding(
            name,
            "problem",
            f"{what}: all rows point the same way",
            f"is --resume a trained checkpoint? {AGAIN}",
        )
    if norm < 0.3:
        return Finding(
            name, "warning", f"{what}: the rows look centred already",
            f"features must be as the host computes them, neither centred nor scaled: {AGAIN}",
        )  # fmt: skip
    if side == "text" and not low <= norm <= high:
        return Finding(
            name, "note", f"{what}: outside of what is usual", "nothing, if the host was trained; else see --resume"
        )
    return ok(name, what)


def text(store: FeatureStore) -> Iterator[Finding]:
    """Whether the text rows [N_sel, D] are distinct, and span more than a few directions."""
    name, rows_ = "features.text", store.text
    if len(rows_) == 0:
        yield Finding(name, "warning", "no text rows, only their mean", "import the file of text embeddings as well")
        return
    zero = int((rows_.norm(dim=1) == 0).sum())
    if zero:
        yield Finding(
            name, "problem", f"of {len(rows_)} text rows {zero} are zero",
            f"rows of classes that were not selected do not belong there: {AGAIN}",
        )  # fmt: skip
        return
    distinct = len(rows_.unique(dim=0))
    if distinct == 1:
        yield Finding(name, "problem", f"all {len(rows_)} text rows are equal", f"are the prompts trained? {AGAIN}")
        return
    directions = unit(rows_.double())
    rank = int(torch.linalg.matrix_rank(directions - directions.mean(0), rtol=1e-3))
    found = f"{len(rows_)} text rows, {distinct} distinct, spanning {rank} directions"
    if distinct < len(rows_) or rank < min(len(rows_), rows_.shape[1]) / 10:
        fix = "near-equal prompts cannot be told apart: is --resume the checkpoint that belongs to these flags?"
        yield Finding(name, "warning", found, fix)
    else:
        yield ok(name, f"{found}, as the host multiplied with them")


def unfinished(folder: Path) -> bool:
    """Whether a capture was begun there and not ended."""
    return (folder / "meta.json").is_file() and not (folder / "index.json").is_file()

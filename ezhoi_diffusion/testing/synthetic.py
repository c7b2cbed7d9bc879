"""A small made-up capture in HICO-DET's layout, with a known map between texts and visual features."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion.features.batch import FeatureBatch, Pairs
from ezhoi_diffusion.features.fingerprint import OPTIONS, Fingerprint
from ezhoi_diffusion.features.score import NEEDED, EzHoiScore
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.features.writer import ROWS_PER_SHARD, FeatureWriter, finish_store
from ezhoi_diffusion.rng import generator

OBJECTS = ("person", "bench", "bicycle", "cup", "dog", "horse", "kite")
VERBS = ("carrying", "feeding", "holding", "hugging", "kicking", "lifting", "pulling", "riding", "training", "washing")
INTERACTIONS = tuple((1 + k // 4, 3 * k % len(VERBS)) for k in range(24))  # object, verb


@dataclass(frozen=True)
class Shape:
    """What a synthetic capture is about, and how crowded its images are. Object 0 is the person.

    Attributes:
        objects: Names of object classes.
        verbs: Names of verbs.
        interactions: Object and verb of each interaction.
        unseen: Number of interactions that a zero-shot split hides.
        rare: Number of interactions in the group `rare`.
        rank: Of the differences between texts.
        people: In an image. With several, the number of objects varies from image to image as in HICO-DET.
        used: Share of pairs that are annotated.
    """

    objects: tuple[str, ...] = OBJECTS
    verbs: tuple[str, ...] = VERBS
    interactions: tuple[tuple[int, int], ...] = INTERACTIONS
    unseen: int = 7
    rare: int = 8
    rank: int = 6  # seen verbs reveal the whole map
    people: int = 1
    used: float = 0.55

    @cached_property
    def order(self) -> list[int]:
        """Interactions, the most frequent first. The last two verbs come last: a split that hides the rarest hides verbs."""
        count = len(self.interactions)
        return sorted(range(count), key=lambda k: (self.interactions[k][1] >= len(self.verbs) - 2, 7 * k % count))


SMALL = Shape()


def hicodet_shape(*, objects: int = 80, verbs: int = 117, interactions: int = 600) -> Shape:
    """HICO-DET's numbers of classes. A fifth of the interactions is unseen, 138 of 600 are rare, and texts span all verbs."""
    # every verb, then every object, then what is left of the table in a fixed order without a pattern
    table = {(1 + verb % (objects - 1), verb): None for verb in range(verbs)}
    table |= {(1 + number % (objects - 1), number * 7 % verbs): None for number in range(10 * interactions)}
    chosen = sorted([*table][:interactions])
    if len(chosen) < max(interactions, verbs):
        raise ValueError(f"{objects} objects and {verbs} verbs cannot have {interactions} interactions")
    return Shape(
        tuple(f"object {number}" for number in range(objects)),
        tuple(f"verb {number}" for number in range(verbs)),
        tuple(chosen),
        unseen=interactions // 5,
        rare=round(0.23 * interactions),
        rank=verbs + 11,
        people=3,
        used=0.13,
    )


# Chosen so that over seeds and widths the bare mAP is 30 to 60, and that of `Truth.text_of` 3 to 20 points higher
TURN = 1.25  # radians by which the map turns a typical direction
NOISE, NOISE_ALL = 0.35, 0.25  # of a feature: in the directions that the map mixes, and in all directions
EMPTY_EVERY = 8  # one image in so many has no pair
NUM_IMAGES = {"train": 38_118, "test": 9_658}  # of HICO-DET
MIN_OBJECTS = 5  # besides three people: EZ-HOI keeps at least three of each, and people are objects too


@dataclass(frozen=True, eq=False)
class Truth:
    """The known truth behind a synthetic store.

    The features of an annotated pair are length · (offset + map·(unit(t) − text_mean) + noise), with t the text of its
    interaction.

    Attributes:
        text: [N_sel, D].
        map: [D, D], orthogonal.
        offset: [D], the mean of visual directions, which makes most of the modality gap.
        mixed: [D, 2·rank], orthonormal: the directions that the map mixes and that hold most of the noise.
        shape: What the texts are about.
    """

    text: Tensor
    map: Tensor
    offset: Tensor
    mixed: Tensor
    shape: Shape

    @classmethod
    def from_seed(cls, *, dim: int = 32, seed: int = 0, shape: Shape = SMALL) -> Truth:
        """The truth of all stores of this width, seed and shape."""
        draw = generator(seed, "synthetic truth", dim)
        rank = max(1, min(shape.rank, dim // 2))
        counts = (len(shape.verbs), len(shape.objects), len(shape.interactions))
        verbs, objects, own = (normalize(torch.randn(n, rank, generator=draw)) for n in counts)
        code = torch.stack(
            [verbs[v] + 0.35 * objects[o] + 0.25 * own[k] for k, (o, v) in enumerate(shape.interactions)]
        )
        # Texts differ in `rank` directions, and the map mixes these with as many others: as hard at any width.
        mixed = torch.linalg.qr(torch.randn(dim, 2 * rank, generator=draw)).Q
        turn = torch.randn(2, mixed.shape[1], mixed.shape[1], generator=draw)[0]
        turn = turn - turn.T
        turn = turn * (TURN * math.sqrt(len(turn)) / turn.norm())
        rotation = torch.eye(dim) + mixed @ (torch.matrix_exp(turn) - torch.eye(len(turn))) @ mixed.T
        cone, offset = normalize(torch.randn(2, dim, generator=draw))
        return cls(1.2 * normalize(cone + 0.9 * code @ mixed[:, :rank].T), rotation, 0.8 * offset, mixed, shape)

    @cached_property
    def text_mean(self) -> Tensor:
        """[D], mean of the unit texts."""
        return normalize(self.text).mean(0)

    def visual_of(self, text: Tensor) -> Tensor:
        """[N, D] visual directions of texts [N, D], without noise."""
        return self.offset + (normalize(text) - self.text_mean) @ self.map.T

    def text_of(self, visual: Tensor) -> Tensor:
        """[N, D] text directions of visual directions [N, D]: the inverse of `visual_of`."""
        return self.text_mean + (visual - self.offset) @ self.map


def synthetic_store(
    folder: Path | str,
    *,
    split: Literal["train", "test"] = "train",
    images: int = 24,
    pairs_per_image: int = 6,
    dim: int = 32,
    seed: int = 0,
    unseen: bool = True,
    shape: Shape = SMALL,
    alter: Callable[[FeatureBatch], FeatureBatch] | None = None,
) -> FeatureStore:
    """Write a made-up capture of a split into `folder`, and open it.

    Every image has one person and `pairs_per_image` objects; the person acts on about half of them. Every eighth image
    has no object and no pair. As in a real capture some objects have a wrong class, some annotated pairs are not
    detected, and the 7 of 24 interactions that the split hides (all of two verbs among them) are annotated too. Logits
    are those of EZ-HOI's published score. Stores of one `dim`, `seed`, `unseen` and `shape` come from one run: train and
    test have the same texts and fingerprint. `Truth.from_seed(dim=dim, seed=seed)` is what can be learned.

    `hicodet_store` writes one of HICO-DET's size. Images go to disk one after the other, so memory does not grow with them.

    Args:
        folder: A new folder.
        split: `train` or `test`.
        images: How many.
        pairs_per_image: P of an image with pairs; their mean where `shape` has several people.
        dim: D.
        seed: The same arguments give the same features.
        unseen: Whether the split hides interactions.
        shape: Classes, and how crowded images are.
        alter: Changes an image before it is written.

    Raises:
        FeatureStoreError: `folder` is in use, or no image has a pair.
    """
    truth = Truth.from_seed(dim=dim, seed=seed, shape=shape)
    ezhoi = _ezhoi_tensors(truth, seed, unseen)
    meta = {
        "split": split,
        "max_images": None,
        "clip_img_file": None,
        "processes": 1,
        "package": version("ezhoi-diffusion"),
        "interactions": [f"a person {shape.verbs[v]} a {shape.objects[o]}" for o, v in shape.interactions],
        "fingerprint": _fingerprint(truth, ezhoi, unseen).to_dict(),
    }
    # More than one shard, as in a large capture.
    rows_per_shard = min(ROWS_PER_SHARD, max(1, images * pairs_per_image // 3))
    writer = FeatureWriter(Path(folder), meta, rows_per_shard=rows_per_shard, seconds_per_shard=math.inf)
    try:
        writer.keep_ezhoi_tensors(ezhoi)
        annotated = 0
        for index in range(images):
            others = 0 if index % EMPTY_EVERY == EMPTY_EVERY - 1 else _objects_in(index, pairs_per_image, shape)
            batch = _image(truth, ezhoi, split, seed, index, others, annotated)
            annotated += len(batch.gt_hoi)
            writer.add(alter(batch) if alter is not None else batch)
        writer.flush()
        return finish_store(Path(folder))
    finally:
        writer.close()


def hicodet_store(
    folder: Path | str,
    *,
    split: Literal["train", "test"] = "train",
    images: int | None = None,
    pairs_per_image: int = 27,
    dim: int = 512,
    seed: int = 0,
    shape: Shape | None = None,
) -> FeatureStore:
    """Write a made-up capture in HICO-DET's real shape, to see what a command takes at full size. Full, it takes 3 GB.

    It is `synthetic_store` with three people in an image and 15 to about 100 pairs. Of all pairs 13 % are annotated.

    Args:
        folder: A new folder.
        split: `train` or `test`.
        images: How many; by default all of HICO-DET.
        pairs_per_image: Mean P of an image with pairs.
        dim: D.
        seed: The same arguments give the same features.
        shape: Classes; those of `hicodet_shape` by default.

    Raises:
        FeatureStoreError: `folder` is in use, or no image has a pair.
    """
    return synthetic_store(
        folder,
        split=split,
        images=NUM_IMAGES[split] if images is None else images,
        pairs_per_image=pairs_per_image,
        dim=dim,
        seed=seed,
        shape=hicodet_shape() if shape is None else shape,
    )


def _objects_in(index: int, pairs: int, shape: Shape) -> int:
    """Number of objects of an image: `pairs` with one person, else at least 5 and exponential, as evenly as it gets."""
    if shape.people == 1:
        return pairs
    quantile = (index * (math.sqrt(5) - 1) / 2) % 1
    return MIN_OBJECTS + round(-math.log1p(-quantile) * max(0.0, pairs / shape.people - MIN_OBJECTS))


def _ezhoi_tensors(truth: Truth, seed: int, unseen: bool) -> dict[str, Tensor]:
    shape, count = truth.shape, len(truth.shape.interactions)
    objects, verbs = torch.tensor(shape.interactions).T
    label = torch.zeros(count, len(shape.verbs))
    label[torch.arange(count), verbs] = 1
    lookup = torch.full((len(shape.objects), len(shape.verbs)), -1)
    lookup[objects, verbs] = torch.arange(count)
    every = torch.arange(count)
    hidden, rare = (torch.isin(every, torch.tensor(shape.order[-number:])) for number in (shape.unseen, shape.rare))
    groups = {"full": every, "rare": every[rare], "non-rare": every[~rare]}
    if unseen:
        groups |= {"unseen": every[hidden], "seen": every[~hidden]}
    return {
        "text": truth.text,
        "text_interaction": torch.arange(count),
        "label": label,
        "sample_lens": label.sum(0),
        "logit_scale": torch.tensor(1.0),
        "hyper_lambda": torch.tensor(1.0),
        "object_to_target": lookup >= 0,
        "object_n_verb_to_interaction": lookup,
        "context/ctx.0": torch.randn(4, truth.text.shape[1], generator=generator(seed, "synthetic context")),
        **{f"classes/{name}": index for name, index in groups.items()},
    }


def _fingerprint(truth: Truth, ezhoi: dict[str, Tensor], unseen: bool) -> Fingerprint:
    weights, context = (
        hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in (truth.map, ezhoi["context/ctx.0"])
    )
    return Fingerprint(
        backbone="synthetic",
        dim=truth.text.shape[1],
        dataset="hicodet",
        zs_type="rare_first" if unseen else None,
        num_classes=len(truth.shape.verbs),
        text_rows=len(truth.shape.interactions),
        logits_type="HO",
        img_align=True,
        txt_align=False,
        weights=weights,
        context=context,
        options=dict.fromkeys((*OPTIONS, "unseen_pt_inj")),
    )


def _image(
    truth: Truth, ezhoi: dict[str, Tensor], split: str, seed: int, index: int, others: int, annotated: int
) -> FeatureBatch:
    """One image of people and `others` objects; `annotated`: how many pairs are annotated in those before it."""
    draw = generator(seed, f"synthetic {split}", index)
    shape = truth.shape
    count, people = len(shape.interactions), shape.people
    number = people * others  # of pairs: all objects of the first person, then those of the next
    of_object = torch.arange(others).repeat(people)
    of_person = torch.arange(people).repeat_interleave(others)

    def chance(share: float, number: int) -> Tensor:
        return torch.rand(number, generator=draw) < share

    used, found, named = chance(shape.used, number), ~chance(0.06, others), ~chance(0.06, others)
    # A low-discrepancy sequence, so that few images already have all interactions, the frequent ones more often.
    weights = torch.zeros(count, dtype=torch.float64)
    weights[shape.order] = 1 / torch.arange(6, 6 + count, dtype=torch.float64)
    acted_on = used.view(people, others).any(0)
    turn = (annotated + acted_on.cumsum(0).double() + 0.3 * (split == "test")) * (math.sqrt(5) - 1) / 2
    dealt = torch.searchsorted(weights.cumsum(0), turn % 1 * weights.sum()).clamp_max(count - 1)
    interaction = torch.where(acted_on, dealt, torch.randint(count, (others,), generator=draw))
    objects, verbs = torch.tensor(shape.interactions)[interaction].T

    # A pair without interaction looks a little like one.
    strength = torch.where(used, 1.0, 0.5 * torch.rand(number, generator=draw)).unsqueeze(1)
    (dim, near) = truth.mixed.shape
    noise = NOISE * math.sqrt(2 / near) * torch.randn(number, near, generator=draw) @ truth.mixed.T
    of_image = torch.randn(dim, generator=draw) / 2
    noise += NOISE_ALL * normalize(torch.randn(number, dim, generator=draw) + of_image)
    length = 4 * (0.08 * torch.randn(number, 1, generator=draw)).exp()
    seen_as = truth.visual_of(truth.text[interaction])[of_object]
    features = length * (truth.offset + strength * (seen_as - truth.offset) + noise)

    boxes_in = people + others
    columns = math.ceil(math.sqrt(boxes_in))
    cell = torch.arange(boxes_in)
    corner = 60 * torch.stack([cell % columns, cell // columns], 1) + 10 * torch.rand(boxes_in, 2, generator=draw)
    boxes = torch.cat([corner, corner + 30 + 15 * torch.rand(boxes_in, 2, generator=draw)], 1)
    by_hand = boxes + 3 * torch.rand(boxes_in, 4, generator=draw)
    by_hand[people:][~found] += 30  # too far from the detected box
    wrong = len(shape.objects) - 1
    other = 1 + (objects - 1 + torch.randint(1, wrong, (others,), generator=draw)) % wrong
    labels = torch.zeros(number, len(shape.verbs), dtype=torch.bool)
    labels[torch.arange(number), verbs[of_object]] = used & found[of_object]
    pairing = torch.stack([of_person, people + of_object])
    pairs = Pairs(
        image=f"synthetic_{split}_{index:08d}.jpg",
        batch_index=0,
        size=torch.tensor([60 * columns + 40, 60 * columns + 40]),
        boxes=boxes,
        scores=0.9 + 0.1 * torch.rand(boxes_in, generator=draw),
        classes=torch.cat([torch.zeros(people, dtype=torch.long), torch.where(named, objects, other)]),
        pairing=pairing,
    )
    return FeatureBatch(
        index=index,
        pairs=pairs,
        adapter_feat=features,
        text=truth.text,
        logits=EzHoiScore(**{name: ezhoi[name] for name in NEEDED}).logits(features),
        labels=labels,
        gt_boxes=by_hand[pairing[:, used]],
        gt_hoi=interaction[of_object][used],
    )


def clip_like_features(count: int, texts: int, dim: int) -> tuple[Tensor, Tensor]:
    """Make pair features [count, dim] and texts [texts, dim] with CLIP's geometry: two narrow cones far apart.

    A text is a verb with an object, in 64 directions around the cone's axis; the norm of the mean of unit texts is about 0.7. A
    pair feature is the text of a class around another axis, with more noise in all directions than there is of the class.
    """
    draw = generator(0, "bench", dim)
    verb, thing, own = (normalize(torch.randn(n, min(64, dim), generator=draw)) for n in (117, 80, texts))
    verbs, things = (torch.randint(n, (texts,), generator=draw) for n in (117, 80))
    basis = torch.linalg.qr(torch.randn(dim, min(64, dim), generator=draw)).Q
    code = (verb[verbs] + 0.35 * thing[things] + 0.25 * own) @ basis.T
    text_axis, visual_axis = normalize(torch.randn(2, dim, generator=draw))
    noise = normalize(torch.randn(count, dim, generator=draw))
    visual = 4 * normalize(visual_axis + 0.7 * code[torch.randint(texts, (count,), generator=draw)] + noise)
    return visual, normalize(text_axis + 0.9 * code)

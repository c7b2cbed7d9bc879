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
from ezhoi_diffusion.features.writer import FeatureWriter, finish_store
from ezhoi_diffusion.rng import generator

OBJECTS = ("person", "bench", "bicycle", "cup", "dog", "horse", "kite")
VERBS = ("carrying", "feeding", "holding", "hugging", "kicking", "lifting", "pulling", "riding", "training", "washing")
INTERACTIONS = tuple((1 + k // 4, 3 * k % len(VERBS)) for k in range(24))  # object, verb
K, C = len(INTERACTIONS), len(VERBS)
# From the most to the least frequent. The last two verbs come last, so a split that hides the rarest hides verbs.
ORDER = sorted(range(K), key=lambda k: (INTERACTIONS[k][1] >= C - 2, 7 * k % K))
NUM_UNSEEN, NUM_RARE = 7, 8

# Chosen so that over seeds and widths the bare mAP is 30 to 60, and that of `Truth.text_of` 3 to 20 points higher
RANK = 6  # of the differences between texts; seen verbs reveal the whole map
TURN = 1.25  # radians by which the map turns a typical direction
NOISE, NOISE_ALL = 0.35, 0.25  # of a feature: in the directions that the map mixes, and in all directions
EMPTY_EVERY = 8  # one image in so many has no pair


@dataclass(frozen=True, eq=False)
class Truth:
    """The known truth behind a synthetic store.

    The features of an annotated pair are length · (offset + map·(unit(t) − text_mean) + noise), with t the text of its
    interaction.

    Attributes:
        text: [N_sel, D].
        map: [D, D], orthogonal.
        offset: [D], the mean of visual directions, which makes most of the modality gap.
        mixed: [D, 12], orthonormal: the directions that the map mixes and that hold most of the noise.
    """

    text: Tensor
    map: Tensor
    offset: Tensor
    mixed: Tensor

    @classmethod
    def from_seed(cls, *, dim: int = 32, seed: int = 0) -> Truth:
        """The truth of all stores of this width and seed."""
        draw = generator(seed, "synthetic truth", dim)
        rank = max(1, min(RANK, dim // 2))
        verbs, objects, own = (normalize(torch.randn(n, rank, generator=draw)) for n in (C, len(OBJECTS), K))
        code = torch.stack([verbs[v] + 0.35 * objects[o] + 0.25 * own[k] for k, (o, v) in enumerate(INTERACTIONS)])
        # Texts differ in `rank` directions, and the map mixes these with as many others: as hard at any width.
        mixed = torch.linalg.qr(torch.randn(dim, 2 * rank, generator=draw)).Q
        turn = torch.randn(2, mixed.shape[1], mixed.shape[1], generator=draw)[0]
        turn = turn - turn.T
        turn = turn * (TURN * math.sqrt(len(turn)) / turn.norm())
        rotation = torch.eye(dim) + mixed @ (torch.matrix_exp(turn) - torch.eye(len(turn))) @ mixed.T
        cone, offset = normalize(torch.randn(2, dim, generator=draw))
        return cls(1.2 * normalize(cone + 0.9 * code @ mixed[:, :rank].T), rotation, 0.8 * offset, mixed)

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
    alter: Callable[[FeatureBatch], FeatureBatch] | None = None,
) -> FeatureStore:
    """Write a made-up capture of a split into `folder`, and open it.

    Every image has one person and `pairs_per_image` objects; the person acts on about half of them. Every eighth image
    has no object and no pair. As in a real capture some objects have a wrong class, some annotated pairs are not
    detected, and the 7 of 24 interactions that the split hides (all of two verbs among them) are annotated too. Logits
    are those of EZ-HOI's published score. Stores of one `dim`, `seed` and `unseen` come from one run: train and test
    have the same texts and fingerprint. `Truth.from_seed(dim=dim, seed=seed)` is what can be learned.

    Args:
        folder: A new folder.
        split: `train` or `test`.
        images: How many.
        pairs_per_image: P of an image with pairs.
        dim: D.
        seed: The same arguments give the same features.
        unseen: Whether the split hides interactions.
        alter: Changes an image before it is written.

    Raises:
        FeatureStoreError: `folder` is in use, or no image has a pair.
    """
    truth = Truth.from_seed(dim=dim, seed=seed)
    ezhoi = _ezhoi_tensors(truth, seed, unseen)
    meta = {
        "split": split,
        "max_images": None,
        "clip_img_file": None,
        "processes": 1,
        "package": version("ezhoi-diffusion"),
        "interactions": [f"a person {VERBS[v]} a {OBJECTS[o]}" for o, v in INTERACTIONS],
        "fingerprint": _fingerprint(truth, ezhoi, unseen).to_dict(),
    }
    # More than one shard, as in a large capture.
    writer = FeatureWriter(
        Path(folder), meta, rows_per_shard=max(1, images * pairs_per_image // 3), seconds_per_shard=math.inf
    )
    try:
        writer.keep_ezhoi_tensors(ezhoi)
        annotated = 0
        for index in range(images):
            others = 0 if index % EMPTY_EVERY == EMPTY_EVERY - 1 else pairs_per_image
            batch = _image(truth, ezhoi, split, seed, index, others, annotated)
            annotated += len(batch.gt_hoi)
            writer.add(alter(batch) if alter is not None else batch)
        writer.flush()
        return finish_store(Path(folder))
    finally:
        writer.close()


def _ezhoi_tensors(truth: Truth, seed: int, unseen: bool) -> dict[str, Tensor]:
    objects, verbs = torch.tensor(INTERACTIONS).T
    label = torch.zeros(K, C)
    label[torch.arange(K), verbs] = 1
    lookup = torch.full((len(OBJECTS), C), -1)
    lookup[objects, verbs] = torch.arange(K)
    every = torch.arange(K)
    hidden, rare = (torch.isin(every, torch.tensor(ORDER[-number:])) for number in (NUM_UNSEEN, NUM_RARE))
    groups = {"full": every, "rare": every[rare], "non-rare": every[~rare]}
    if unseen:
        groups |= {"unseen": every[hidden], "seen": every[~hidden]}
    return {
        "text": truth.text,
        "text_interaction": torch.arange(K),
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
        num_classes=C,
        text_rows=K,
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
    """One image of a person and `others` objects; `annotated`: how many pairs are annotated in those before it."""
    draw = generator(seed, f"synthetic {split}", index)

    def chance(share: float) -> Tensor:
        return torch.rand(others, generator=draw) < share

    used, found, named = chance(0.55), ~chance(0.06), ~chance(0.06)
    # A low-discrepancy sequence, so that few images already have all interactions, the frequent ones more often.
    weights = torch.zeros(K, dtype=torch.float64)
    weights[ORDER] = 1 / torch.arange(6, 6 + K, dtype=torch.float64)
    turn = (annotated + used.cumsum(0).double() + 0.3 * (split == "test")) * (math.sqrt(5) - 1) / 2
    dealt = torch.searchsorted(weights.cumsum(0), turn % 1 * weights.sum()).clamp_max(K - 1)
    interaction = torch.where(used, dealt, torch.randint(K, (others,), generator=draw))
    objects, verbs = torch.tensor(INTERACTIONS)[interaction].T

    # A pair without interaction looks a little like one.
    strength = torch.where(used, 1.0, 0.5 * torch.rand(others, generator=draw)).unsqueeze(1)
    (dim, near) = truth.mixed.shape
    noise = NOISE * math.sqrt(2 / near) * torch.randn(others, near, generator=draw) @ truth.mixed.T
    of_image = torch.randn(dim, generator=draw) / 2
    noise += NOISE_ALL * normalize(torch.randn(others, dim, generator=draw) + of_image)
    length = 4 * (0.08 * torch.randn(others, 1, generator=draw)).exp()
    features = length * (truth.offset + strength * (truth.visual_of(truth.text[interaction]) - truth.offset) + noise)

    columns = math.ceil(math.sqrt(others + 1))
    cell = torch.arange(others + 1)
    corner = 60 * torch.stack([cell % columns, cell // columns], 1) + 10 * torch.rand(others + 1, 2, generator=draw)
    boxes = torch.cat([corner, corner + 30 + 15 * torch.rand(others + 1, 2, generator=draw)], 1)
    by_hand = boxes + 3 * torch.rand(others + 1, 4, generator=draw)
    by_hand[1:][~found] += 30  # too far from the detected box
    other = 1 + (objects - 1 + torch.randint(1, len(OBJECTS) - 1, (others,), generator=draw)) % (len(OBJECTS) - 1)
    labels = torch.zeros(others, C, dtype=torch.bool)
    labels[torch.arange(others), verbs] = used & found
    pairs = Pairs(
        image=f"synthetic_{split}_{index:08d}.jpg",
        batch_index=0,
        size=torch.tensor([60 * columns + 40, 60 * columns + 40]),
        boxes=boxes,
        scores=0.9 + 0.1 * torch.rand(others + 1, generator=draw),
        classes=torch.cat([torch.tensor([0]), torch.where(named, objects, other)]),
        pairing=torch.stack([torch.zeros(others, dtype=torch.long), 1 + torch.arange(others)]),
    )
    return FeatureBatch(
        index=index,
        pairs=pairs,
        adapter_feat=features,
        text=truth.text,
        logits=EzHoiScore(**{name: ezhoi[name] for name in NEEDED}).logits(features),
        labels=labels,
        gt_boxes=torch.stack([by_hand[:1].expand(others, 4)[used], by_hand[1:][used]]),
        gt_hoi=interaction[used],
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

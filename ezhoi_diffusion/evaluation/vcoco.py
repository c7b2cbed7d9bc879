"""Compares bridges on a capture of V-COCO by its role AP, from V-COCO's own annotations: the host has no evaluation of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ezhoi_diffusion.evaluation.comparison import FULL, Comparison
from ezhoi_diffusion.evaluation.protocols import EvalProtocol, StoredImage, scored_pairs
from ezhoi_diffusion.evaluation.replay import replay
from ezhoi_diffusion.evaluation.role_ap import SCENARIOS, match_roles
from ezhoi_diffusion.evaluation.variants import Variant
from ezhoi_diffusion.evaluation.vcoco_annotations import Vcoco, read_vcoco
from ezhoi_diffusion.features.score import EzHoiScore, ScoreError, names_of_interactions
from ezhoi_diffusion.features.store import FeatureStore


def replay_roles(store: FeatureStore, variants: Mapping[str, Variant], folder: Path, **options: Any) -> Comparison:
    """The comparison that V-COCO's tool would give of the `cache.pkl` of each variant, from a capture of one split.

    Classes are its R action-roles in scenario 1, then in scenario 2; the full group is both. folder: V-COCO's annotations, see
    `read_vcoco`. options: of `replay`. The host has no class for one action-role, `point-instr`, whose AP is 0; where it
    lacks any, groups without them are beside those of all. Raises ScoreError, VcocoError, and what `replay` raises.
    """
    if store.fingerprint.get("dataset") != "vcoco":
        raise ScoreError(
            f"{store.folder} is a capture of {store.fingerprint.get('dataset')}, not of V-COCO: leave --vcoco out"
        )
    data = read_vcoco(folder, [str(image["name"]) for image in store.images])
    return replay(store, variants, evaluation=evaluation_of(store, data), algorithm="VOC", **options)


def evaluation_of(store: FeatureStore, data: Vcoco) -> EvalProtocol:
    """V-COCO's own, of the host's actions. Raises ScoreError where V-COCO does not know one of them."""
    role = _roles(store, data)
    count = len(data.roles)
    captured = {image["name"] for image in store.images}
    elsewhere = [one.counts() for name, one in data.annotations.items() if name not in captured]
    groups = {name: torch.arange(count) + number * count for number, name in enumerate(SCENARIOS)}
    own = role.sort().values
    if len(own) < count:
        groups |= {f"{name} of {len(own)}": index[own] for name, index in groups.items()}
    groups = {FULL: torch.arange(2 * count), **groups}
    return EvalProtocol(
        find=functools.partial(_detections, EzHoiScore.from_store(store), data, role),
        count=lambda image: data.annotations[str(image.name)].counts(),
        groups=groups,
        names=[f"{name}, {scenario}" for scenario in SCENARIOS for name in data.roles],
        elsewhere=torch.stack(elsewhere) if elsewhere else torch.zeros(0, 2 * count, dtype=torch.long),
    )


def _roles(store: FeatureStore, data: Vcoco) -> Tensor:
    """[C] int64, the action-role that each target class of the host is: `hit instr` is `hit-instr`."""
    names = names_of_interactions(store)
    if names is None:
        raise ScoreError(
            f"{store.folder} does not say how its host calls V-COCO's actions: capture it with this version"
        )
    unknown = [name for name in names if name.replace(" ", "-") not in data.roles]
    if unknown:
        raise ScoreError(
            f"{store.folder}: V-COCO has no action-role called {', '.join(unknown)}; it has {', '.join(data.roles)}"
        )
    return torch.tensor([data.roles.index(name.replace(" ", "-")) for name in names])


def _detections(score: EzHoiScore, data: Vcoco, role: Tensor, image: StoredImage) -> tuple[Tensor, ...]:
    """As the host caches them: a person's box, an action-role, the other's box, in pixels of the picture."""
    row, target, prior = scored_pairs(score, image.pairs)
    scale = data.sizes[str(image.name)] / image.pairs.size.flip(0)
    humans, others = (image.pairs.boxes * scale.repeat(2))[image.pairs.pairing[:, row]]
    annotated = data.annotations[str(image.name)]
    kept, classes, candidate, annotation = match_roles(annotated, humans, others, role[target])
    return row[kept], target[kept], classes, prior[kept], candidate, annotation

"""What a bench measures on: rows and texts, captured or made up, and a bridge that has learned something."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ezhoi_diffusion.bench.training import silently
from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.features.split import validation_mask
from ezhoi_diffusion.features.statistics import ModalityStatistics
from ezhoi_diffusion.features.store import FeatureStore
from ezhoi_diffusion.rng import generator
from ezhoi_diffusion.training.config import TrainConfig
from ezhoi_diffusion.training.data import TrainingData
from ezhoi_diffusion.training.distillation import distill
from ezhoi_diffusion.training.trainer import train

DIM, TEXTS = 512, 212  # ViT-B's width, and EZ-HOI's text rows with its unseen-verb split
ROWS, LEARNABLE = 1024, 4096
VERBS, OBJECTS, RANK = 117, 80, 64
VALIDATE_EVERY = 50
HALVED = 8  # what unet1d divides a width by


class BenchError(EzhoiDiffusionError):
    """What is to be measured does not fit together, or cannot be measured here."""


@dataclass(frozen=True, eq=False)
class BenchData:
    """The features that are measured on.

    Visual features [N, D] that nothing has learned from, others to learn from [M, D], text features [N_sel, D], the means of
    both sides, and where they come from.
    """

    rows: Tensor
    learnable: Tensor
    text: Tensor
    statistics: ModalityStatistics
    origin: str

    @property
    def data(self) -> TrainingData:
        """What the default recipe learns from: the text rows alone."""
        return TrainingData(self.rows[:0], torch.zeros(0, dtype=torch.long), self.text, self.statistics)


def made_up(*, dim: int = DIM, texts: int = TEXTS, rows: int = ROWS) -> BenchData:
    """Rows with the geometry that CLIP's have: two narrow cones far apart, and few directions in which classes differ.

    A text is a verb with an object, in 64 directions around the cone's axis; the norm of the mean of unit texts is about .7. A
    visual row is the text of a class around another axis, with more noise in all directions than there is of the class.
    """
    draw = generator(0, "bench", dim)
    rank = min(RANK, dim)
    verb, thing, own = (normalize(torch.randn(n, rank, generator=draw)) for n in (VERBS, OBJECTS, texts))
    verbs, things = (torch.randint(n, (texts,), generator=draw) for n in (VERBS, OBJECTS))
    basis = torch.linalg.qr(torch.randn(dim, rank, generator=draw)).Q
    code = (verb[verbs] + 0.35 * thing[things] + 0.25 * own) @ basis.T
    of_text, of_visual = normalize(torch.randn(2, dim, generator=draw))
    text = normalize(of_text + 0.9 * code)
    count = rows + LEARNABLE
    noise = normalize(torch.randn(count, dim, generator=draw))
    visual = 4 * normalize(of_visual + 0.7 * code[torch.randint(texts, (count,), generator=draw)] + noise)
    return BenchData(
        visual[:rows], visual[rows:], text, ModalityStatistics.compute([visual], text), "made up, in CLIP's geometry"
    )


def captured(store: FeatureStore) -> BenchData:
    """Rows of a test split, or of those images of a train split that no training takes a step on, as many as are needed.

    Raises BenchError where there are none, and for a width that the guide's network does not take.
    """
    if store.text.shape[1] % HALVED:
        raise BenchError(
            f"{store.folder} holds rows of width {store.text.shape[1]}, and the guide's unet1d, against which all is measured, takes "
            f"multiples of {HALVED}"
        )
    apart = torch.ones(len(store.images), dtype=torch.bool)
    if store.split == "train":
        try:
            apart = validation_mask(len(store.images))
        except ValueError as error:
            raise BenchError(f"{store.folder} has too few images: {error}. Capture more") from error
    chosen, seen = apart[store.image_index()], 0
    parts: tuple[list[Tensor], list[Tensor]] = [], []
    for shard in store.shards():
        rows = shard["adapter_feat"]
        mine = chosen[seen : seen + len(rows)]
        seen += len(rows)
        for part, these in zip(parts, (mine, ~mine), strict=True):
            part.append(rows[these])
        if sum(map(len, parts[0])) >= ROWS and (store.split == "test" or sum(map(len, parts[1])) >= LEARNABLE):
            break
    found, others = (torch.cat([store.text[:0], *part]) for part in parts)
    if len(found) == 0:
        raise BenchError(
            f"{store.folder} has no pair on a held-out image, so there is nothing to measure: capture more"
        )
    mixed = torch.randperm(len(found), generator=generator(0, "bench"))[
        :ROWS
    ]  # so that a part of them is of many images
    return BenchData(
        found[mixed], others[:LEARNABLE], store.text, store.statistics(), f"{store.folder}, {store.split} split"
    )


@dataclass(frozen=True, eq=False)
class Training:
    """The default bridge, the closed-form Gaussian on the same rows, and when the one was better than the other on held-out rows.

    bar, val_loss: the Gaussian's loss there, and the lowest of the network. reached: step and seconds at which it was first below the bar.
    """

    bridge: DiffusionBridge
    gaussian: DiffusionBridge
    bar: float
    val_loss: float
    reached: tuple[int, float] | None
    steps: int
    seconds: float

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        step, seconds = self.reached or (None, None)
        return {
            "wiener_val_loss": self.bar,
            "val_loss": self.val_loss,
            "reached_at_step": step,
            "reached_after_seconds": seconds,
            "steps": self.steps,
            "seconds": self.seconds,
        }


def trained(
    subject: BenchData, steps: int, registry: Components, device: torch.device, on_step: Callable[[int], None]
) -> Training:
    """Train the default bridge for `steps` steps on the subject's texts, and fit the other to them."""
    every = min(VALIDATE_EVERY, steps)
    config = replace(TrainConfig(), train_steps=steps, val_every=every, checkpoint_every=steps)
    stamps = [0.0]

    def note(step: int) -> None:
        stamps.append(time.perf_counter() - began)
        on_step(step)

    with TemporaryDirectory() as folder, silently():
        fitted = train(subject.data, replace(config, denoiser="gaussian"), Path(folder) / "gaussian", registry=registry)
        began = time.perf_counter()
        out = train(subject.data, config, Path(folder) / "bridge", registry=registry, on_step=note)
        bar = json.loads((fitted / "training.json").read_text())["val_loss"]
        history = json.loads((out / "training.json").read_text())["history"]
        gaussian, bridge = (
            DiffusionBridge.from_pretrained(path, registry=registry, device=device) for path in (fitted, out)
        )
    validated = [(record["step"], record["val_loss"]) for record in history if "val_loss" in record]
    first = next((step for step, loss in validated if loss < bar), None)
    reached = None if first is None else (first, stamps[first])
    return Training(bridge, gaussian, bar, min(loss for _, loss in validated), reached, steps, stamps[-1])


def student_of(bridge: DiffusionBridge, subject: BenchData, steps: int, device: torch.device) -> DiffusionBridge | None:
    """A student of the bridge as it is applied; None where there is nothing to distil, or no row to learn from."""
    if (
        bridge.config.student_of is not None
        or bridge.config.recipe.num_steps == 1
        or bridge.config.denoiser == "unet1d"
    ):
        return None  # the last one would take minutes an evaluation for the rows that a student learns from
    if min(len(subject.learnable), len(subject.rows)) < 2:
        return None
    few = subject.rows[:2]  # what it is judged by; that is done here, too, with all others
    with silently():
        student, _ = distill(bridge, subject.learnable, few, subject.text, train_steps=steps, device=device)
    return student.to(device)


def require_fit(bridge: DiffusionBridge, folder: str, subject: BenchData) -> None:
    """Raises BenchError where a bridge is for rows of another width."""
    if bridge.config.dim != subject.text.shape[1]:
        raise BenchError(
            f"the bridge in {folder} is for rows of width {bridge.config.dim}, and those of {subject.origin} have "
            f"{subject.text.shape[1]}: give features and a bridge of the same backbone"
        )

"""training.json: what a training did, and the records of its losses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from typing_extensions import NotRequired, TypedDict

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.files import read_json
from ezhoi_diffusion.schema import Count

FACTS = "training.json"
Range = Annotated[list[Count], msgspec.Meta(min_length=2, max_length=2)]


class LossRecord(TypedDict):
    """The losses of a step."""

    step: Count
    loss: float
    lr: NotRequired[float]
    val_loss: NotRequired[float]
    val_loss_by_range: NotRequired[list[float]]


class Losses(TypedDict):
    """What the provenance of a trained bridge says of its losses, among others."""

    val_loss: float
    isotropic_val_loss: float


class Refit(TypedDict):
    """The second phase, on all features."""

    step: Count
    rows: Count
    history: list[LossRecord]


class TrainingFile(TypedDict):
    """training.json: the search, with its losses by ranges of timesteps too, and the refit."""

    config: dict[str, Any]
    step: Count
    isotropic_val_loss: float
    ranges: list[Range]
    val_loss_by_range: list[float]
    isotropic_val_loss_by_range: list[float]
    stopped: NotRequired[str]
    val_loss: NotRequired[float]
    best_step: NotRequired[Count]
    best_val_loss: NotRequired[float]
    history: list[LossRecord]
    refit: NotRequired[Refit]


def read_facts(folder: Path) -> dict[str, Any]:
    """Read training.json of a bridge. Raises EzhoiDiffusionError where it is missing, changed or malformed."""
    return read_json(folder / FACTS, TrainingFile, EzhoiDiffusionError, "train the bridge again")

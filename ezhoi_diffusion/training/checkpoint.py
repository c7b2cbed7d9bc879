"""Checkpoints: numbered folders, of which the newest complete one counts."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import TypedDict

from ezhoi_diffusion.files import (
    REPLACED,
    STAGED,
    new_folder,
    put_back,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from ezhoi_diffusion.schema import LARGEST, FileFacts, Finite, TensorSpec, table_of, tensors_problem
from ezhoi_diffusion.training.config import TrainConfig, TrainingError
from ezhoi_diffusion.training.facts import LossRecord

NUM_KEPT = 2
MANIFEST = "manifest.json"
TENSORS = ("model", "ema", "optimizer")


class Files(TypedDict):
    """The files of a checkpoint."""

    model: FileFacts
    ema: FileFacts
    optimizer: FileFacts


class State(TypedDict):
    """What a training needs beside tensors to go on."""

    step: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    history: list[LossRecord]
    pending: list[float]
    seconds: Finite
    config: dict[str, Any]
    data_sha256: str
    scaler: dict[str, float] | None


class Manifest(TypedDict):
    """manifest.json."""

    files: Files
    state: State


def write_checkpoint(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write `folder`/step-… completely or not at all, then remove all but the last two complete ones."""
    with new_folder(folder / f"step-{step:09d}") as staged:
        files = {name: write_tensors(staged / f"{name}.safetensors", content) for name, content in tensors.items()}
        write_json(staged / MANIFEST, {"files": files, "state": state})
    for path in folder.glob(f"step-*{STAGED}"):  # left by a killed writer
        shutil.rmtree(path)
    _put_back(folder)
    complete = 0
    for path in _newest_first(folder):
        if complete == NUM_KEPT:
            shutil.rmtree(path)
        elif not isinstance(_read(path), str):
            complete += 1


def read_newest(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Read the newest complete checkpoint, and warn of every newer one that is not complete.

    The caller has to be the only writer: what a killed writer moved aside is put back.

    Returns:
        Tensors and state, or None where there is no checkpoint.

    Raises:
        TrainingError: There are checkpoints, and none is complete.
    """
    _put_back(folder)
    found = _newest_first(folder)
    for path in found:
        content = _read(path)
        if not isinstance(content, str):
            return content
        warnings.warn(f"skipping checkpoint {path}: {content}", stacklevel=2)
    if found:
        raise TrainingError(f"{folder} has no complete checkpoint to resume from: remove that folder to start over")
    return None


def require_same_run(state: dict[str, Any], config: TrainConfig, data_sha256: str) -> None:
    """Raise TrainingError, which names the differences, unless `state` may go on under `config`."""
    departures = config.departures(state["config"])
    if departures:
        raise TrainingError(f"cannot resume with another configuration: {', '.join(departures)}")
    if config.train_steps < state["step"]:
        raise TrainingError(f"cannot resume: step {state['step']} lies beyond train_steps {config.train_steps}")
    if state["data_sha256"] != data_sha256:
        raise TrainingError("cannot resume on other features than those the training began with")


def require_tensors(
    tensors: dict[str, dict[str, Tensor]], network: nn.Module, ema: AveragedModel, optimizer: torch.optim.Optimizer
) -> None:
    """Raise ValueError unless the tensors of a checkpoint are those of this network, its average, and its AdamW.

    The optimizer would copy other moments as they are, and write beyond their end.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moved = {name.partition(".")[0] for name in tensors["optimizer"]}  # others had no gradient yet
    moments = {
        f"{number}.{key}": TensorSpec(torch.float32, "" if key == "step" else " ".join(map(str, p.shape)), low)
        for number, p in enumerate(parameters)
        for key, low in (("step", 1.0), ("exp_avg", -LARGEST), ("exp_avg_sq", 0.0))
        if str(number) in moved
    }
    tables = {
        "model": table_of(network.state_dict()),
        "ema": table_of(ema.state_dict()),
        "optimizer": moments,
    }
    for name, table in tables.items():
        problem = tensors_problem(tensors[name], table)
        if problem:
            raise ValueError(f"{name}.safetensors: {problem}")


def flat(moments: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Name the state of an optimizer as a safetensors file takes it: parameter.moment."""
    return {f"{i}.{key}": value for i, kept in moments.items() for key, value in kept.items()}


def nested(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Undo `flat`."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = value
    return moments


def _put_back(folder: Path) -> None:
    for path in folder.glob(f"step-*{REPLACED}"):
        put_back(path.with_name(path.name.removesuffix(REPLACED)))


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdigit()), reverse=True)


def _read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | str:
    """Read tensors and state of one checkpoint, or return why it is not complete."""
    remedy = "it is not used"
    try:
        manifest = read_json(path / MANIFEST, Manifest, TrainingError, remedy)
        files, state = manifest["files"], manifest["state"]
        if state["step"] != int(path.name[5:]):
            return f"{path / MANIFEST} is of step {state['step']}"
        if any(("val_loss" in record) != ("val_loss_by_range" in record) for record in state["history"]):
            return f"{path / MANIFEST} has a validation without its ranges"
        tensors = {
            name: read_tensors(path / f"{name}.safetensors", files[name], TrainingError, remedy) for name in TENSORS
        }
    except TrainingError as error:
        return str(error)
    return tensors, state

"""Resumable state as numbered folders; the newest one that is whole counts."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from ezhoi_diffusion.files import new_folder, read_json, read_tensors, sha256, write_json, write_tensors
from ezhoi_diffusion.training.config import TrainConfig, TrainingError

KEEP = 2
STATE, MANIFEST = "state.json", "manifest.json"


def write_checkpoint(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write `folder`/step-…, whole or not at all, then remove all but the last two whole ones."""
    with new_folder(folder / f"step-{step:09d}") as staged:
        for name, content in tensors.items():
            write_tensors(staged / f"{name}.safetensors", content)
        write_json(staged / STATE, state)
        manifest = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(staged.iterdir())}
        write_json(staged / MANIFEST, manifest)
    whole = 0
    for path in _newest_first(folder):
        if whole == KEEP:
            shutil.rmtree(path)
        elif _fault(path) is None:
            whole += 1


def read_newest(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Tensors and state of the newest whole checkpoint, or None; warns of every newer one that is not whole."""
    for path in _newest_first(folder):
        fault = _fault(path)
        if fault is None:
            remedy = "remove this checkpoint"
            files = path.glob("*.safetensors")
            tensors = {file.stem: read_tensors(file, TrainingError, remedy) for file in files}
            return tensors, read_json(path / STATE, TrainingError, remedy)
        warnings.warn(f"skipping checkpoint {path}: {fault}", stacklevel=2)
    return None


def require_same_run(state: dict[str, Any], config: TrainConfig, data_sha256: str) -> None:
    """Raises TrainingError, which names what differs, unless `state` may go on under `config`."""
    then, now = state["config"], config.to_dict()
    differing = [name for name in now if name != "train_steps" and now[name] != then.get(name)]
    if differing:
        listed = ", ".join(f"{name} (was {then.get(name)!r}, is {now[name]!r})" for name in differing)
        raise TrainingError(f"cannot resume with another configuration: {listed}")
    if config.train_steps < state["step"]:
        raise TrainingError(f"cannot resume: step {state['step']} lies beyond train_steps {config.train_steps}")
    if state["data_sha256"] != data_sha256:
        raise TrainingError("cannot resume on other embeddings than those it was begun with")


def flat(moments: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The state of an optimizer under names that a safetensors file takes: parameter.moment."""
    return {f"{i}.{key}": value for i, kept in moments.items() for key, value in kept.items()}


def nested(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The inverse of `flat`."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = value
    return moments


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdigit()), reverse=True)


def _fault(path: Path) -> str | None:
    """Why this checkpoint is not whole, or None."""
    try:
        manifest = read_json(path / MANIFEST, TrainingError, "it is incomplete")
        for name, facts in manifest.items():
            file = path / name
            if file.stat().st_size != facts["bytes"] or sha256(file) != facts["sha256"]:
                return f"{name} has changed since it was written"
        return None if STATE in manifest else f"{MANIFEST} does not list {STATE}"
    except (OSError, KeyError, TypeError, TrainingError) as error:
        return str(error)

"""A bridge as a folder: config.json, and its weights, statistics and context vectors as safetensors."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ezhoi_diffusion.diffusion.recipes import Recipe
from ezhoi_diffusion.diffusion.schedule import OBJECTIVES, Objective, Schedule
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.files import current, read_json, read_tensors, replaced_files, write_json, write_tensors

SCHEMA_VERSION = 1
CONFIG = "config.json"
MODEL, STATISTICS, CONTEXT = "model.safetensors", "statistics.safetensors", "context.safetensors"
ATTEMPTS = 3  # to read an artefact that does not fit together
REMEDY = "restore the artefact from where it came, or train anew"
MAX_DIM, MAX_TIMESTEPS = 65536, 100_000


class BridgeError(EzhoiDiffusionError):
    """An artefact cannot be read or built, or a bridge was given something that it cannot take."""


@dataclass(frozen=True)
class BridgeConfig:
    """What config.json holds, apart from sizes and hashes of the files beside it.

    `provenance` is the writer's own JSON (host fingerprint, training facts, versions): kept, never
    interpreted here. Raises ValueError for values that contradict each other.
    """

    dim: int
    recipe: Recipe
    denoiser: str
    denoiser_options: dict[str, Any] = field(default_factory=dict)
    objective: Objective = "pred_x0"
    timesteps: int = 1000
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("denoiser", str), ("denoiser_options", dict), ("provenance", dict)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be a {kind.__name__}, not {getattr(self, name)!r:.100}")
        for name, limit in (("dim", MAX_DIM), ("timesteps", MAX_TIMESTEPS)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"{name} must be a whole number from 1 to {limit}, not {value!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}")
        if self.recipe.start_step > self.timesteps:
            raise ValueError(
                f"recipe {self.recipe.name!r} starts at {self.recipe.start_step}, beyond the schedule's "
                f"{self.timesteps} levels"
            )

    def schedule(self) -> Schedule:
        """The noise schedule, always the cosine one."""
        return Schedule.cosine(self.timesteps)


def write_artifact(folder: Path, config: BridgeConfig, files: dict[str, dict[str, Tensor]]) -> None:
    """Write all files of an artefact into `folder`, together or not at all; other entries of it stay.

    Raises BridgeError where the disk refuses.
    """
    try:
        with replaced_files(folder) as staged:
            written = {name: write_tensors(staged / name, tensors) for name, tensors in files.items()}
            content = {"schema_version": SCHEMA_VERSION, "bridge": "diffusion", **asdict(config), "files": written}
            write_json(staged / CONFIG, content)
    except OSError as error:
        raise BridgeError(
            f"{folder} could not take the bridge ({error}): free space there, or give another folder, and try again; what "
            f"was there is unharmed"
        ) from error


def read_artifact(folder: Path) -> tuple[BridgeConfig, dict[str, dict[str, Tensor]]]:
    """The configuration, and the tensors of every file on the CPU. Raises BridgeError if one is not whole."""
    for _ in range(ATTEMPTS - 1):
        try:
            return _read_artifact(folder)
        except BridgeError:
            time.sleep(0.02)  # a training may be replacing its best bridge just now
    return _read_artifact(folder)


def _read_artifact(folder: Path) -> tuple[BridgeConfig, dict[str, dict[str, Tensor]]]:
    path = current(folder, CONFIG)
    content = read_json(path, BridgeError, "give the folder of a finished training")
    try:
        config, files = _parse(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BridgeError(f"{path} does not describe a diffusion bridge: {reason}") from error
    return config, {
        name: read_tensors(current(folder, name), facts, BridgeError, REMEDY) for name, facts in files.items()
    }


def _parse(content: dict[str, Any]) -> tuple[BridgeConfig, dict[str, dict[str, Any]]]:
    content = dict(content)
    version, kind, files = content.pop("schema_version"), content.pop("bridge"), content.pop("files")
    if (version, kind) != (SCHEMA_VERSION, "diffusion"):
        raise ValueError(
            f"it is a {kind!r} of schema version {version!r}, and this ezhoi-diffusion reads 'diffusion' "
            f"of version {SCHEMA_VERSION}: upgrade the package, or train anew"
        )
    if not isinstance(files, dict) or not all(_is_size_and_hash(facts) for facts in files.values()):
        raise ValueError(f"'files' must give each file's size and SHA-256, not {files!r:.100}")
    unknown = set(files) - {MODEL, STATISTICS, CONTEXT}
    missing = {MODEL, STATISTICS} - set(files)
    if unknown or missing:
        raise ValueError(f"unexpected or missing entries in 'files': {', '.join(sorted(unknown | missing))}")
    return BridgeConfig(**{**content, "recipe": Recipe(**content["recipe"])}), files


def _is_size_and_hash(facts: Any) -> bool:
    return (
        isinstance(facts, dict)
        and type(facts.get("bytes")) is int
        and facts["bytes"] >= 0
        and isinstance(facts.get("sha256"), str)
        and len(facts["sha256"]) == 64
    )

"""A diffusion bridge's artefact: its configuration, weights, statistics and context vectors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ezhoi_diffusion.artifact import CONFIG, CONTEXT, Artifact, BridgeError
from ezhoi_diffusion.diffusion.recipes import Recipe, recipe_of
from ezhoi_diffusion.diffusion.schedule import OBJECTIVES, Objective, Schedule
from ezhoi_diffusion.files import current

BRIDGE = "diffusion"
MODEL, STATISTICS = "model.safetensors", "statistics.safetensors"
MAX_DIM, MAX_TIMESTEPS = 65536, 100_000


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
    student_of: dict[str, Any] | None = None
    """Of a distilled bridge: its teacher's denoiser, and how that was applied."""
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("denoiser", str), ("denoiser_options", dict), ("provenance", dict)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be a {kind.__name__}, not {getattr(self, name)!r:.100}")
        if not isinstance(self.student_of, (dict, type(None))):
            raise ValueError(f"student_of must be an object or null, not {self.student_of!r:.100}")
        for name, limit in (("dim", MAX_DIM), ("timesteps", MAX_TIMESTEPS)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"{name} must be a whole number from 1 to {limit}, not {value!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}")
        if self.recipe.start_timestep > self.timesteps:
            raise ValueError(
                f"recipe {self.recipe.name!r} starts at {self.recipe.start_timestep}, beyond the schedule's "
                f"{self.timesteps} levels"
            )

    def schedule(self) -> Schedule:
        """The noise schedule, always the cosine one."""
        return Schedule.cosine(self.timesteps)


def write_artifact(folder: Path, config: BridgeConfig, files: dict[str, dict[str, Tensor]]) -> None:
    """Write all files of an artefact into `folder`, together or not at all. Raises BridgeError."""
    content = asdict(config)
    provenance = content.pop("provenance")
    Artifact(BRIDGE, content, files, provenance).save(folder)


def read_artifact(folder: Path) -> tuple[BridgeConfig, dict[str, dict[str, Tensor]]]:
    """The configuration, and the tensors of every file on the CPU. Raises BridgeError if one is not whole."""
    artifact = Artifact.load(folder, BRIDGE)
    unexpected = set(artifact.files) - {MODEL, STATISTICS, CONTEXT}
    missing = {MODEL, STATISTICS} - set(artifact.files)
    try:
        if unexpected or missing:
            raise ValueError(f"unexpected or missing entries in 'files': {', '.join(sorted(unexpected | missing))}")
        content = {**artifact.config, "recipe": recipe_of(artifact.config["recipe"])}
        return BridgeConfig(**content, provenance=artifact.provenance), artifact.files
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BridgeError(f"{current(folder, CONFIG)} does not describe a diffusion bridge: {reason}") from error

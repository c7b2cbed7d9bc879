"""The artefact of a diffusion bridge: configuration, weights, statistics and context vectors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ezhoi_diffusion.artifact import CONFIG, CONTEXT, Artifact, BridgeError
from ezhoi_diffusion.diffusion.recipes import MAX_TIMESTEPS, OBJECTIVES, Objective, Recipe
from ezhoi_diffusion.diffusion.schedule import Schedule
from ezhoi_diffusion.files import current

BRIDGE = "diffusion"
MODEL, STATISTICS = "model.safetensors", "statistics.safetensors"
MAX_DIM = 65536


@dataclass(frozen=True)
class BridgeConfig:
    """Fields that a diffusion bridge adds to config.json. Raises ValueError for values that contradict each other."""

    dim: int
    recipe: Recipe
    denoiser: str
    denoiser_options: dict[str, Any] = field(default_factory=dict)
    objective: Objective = "pred_x0"
    num_timesteps: int = 1000
    student_of: dict[str, Any] | None = None
    """Of a distilled bridge: the denoiser of its teacher, and how it was applied."""

    def __post_init__(self) -> None:
        for name, kind in (("denoiser", str), ("denoiser_options", dict)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be a {kind.__name__}, not {getattr(self, name)!r:.100}")
        if not isinstance(self.student_of, (dict, type(None))):
            raise ValueError(f"student_of must be an object or null, not {self.student_of!r:.100}")
        for name, limit in (("dim", MAX_DIM), ("num_timesteps", MAX_TIMESTEPS)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"{name} must be a whole number from 1 to {limit}, not {value!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}")
        if self.recipe.start_timestep > self.num_timesteps:
            raise ValueError(
                f"recipe {self.recipe.name!r} starts at timestep {self.recipe.start_timestep}, and the schedule has "
                f"{self.num_timesteps} timesteps"
            )

    def schedule(self) -> Schedule:
        """Return the noise schedule; it is always the cosine one."""
        return Schedule.cosine(self.num_timesteps)


def write_artifact(
    folder: Path, config: BridgeConfig, files: dict[str, dict[str, Tensor]], provenance: dict[str, Any]
) -> None:
    """Write all files of the artefact into `folder`, or none. Raises BridgeError."""
    Artifact(BRIDGE, asdict(config), files, provenance).save(folder)


def read_artifact(folder: Path) -> tuple[BridgeConfig, Artifact]:
    """Read the configuration, and the artefact with its tensors on the CPU. Raises BridgeError unless it is complete."""
    artifact = Artifact.load(folder, BRIDGE)
    unexpected = set(artifact.files) - {MODEL, STATISTICS, CONTEXT}
    missing = {MODEL, STATISTICS} - set(artifact.files)
    try:
        if unexpected or missing:
            raise ValueError(f"unexpected or missing entries in 'files': {', '.join(sorted(unexpected | missing))}")
        return BridgeConfig(**{**artifact.config, "recipe": Recipe(**artifact.config["recipe"])}), artifact
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BridgeError(f"{current(folder, CONFIG)} does not describe a diffusion bridge: {reason}") from error

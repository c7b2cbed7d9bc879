"""The artefact of a diffusion bridge: configuration, weights, statistics and context vectors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from ezhoi_diffusion.artifact import CONFIG, REMEDY, Artifact, BridgeError
from ezhoi_diffusion.diffusion.recipes import MAX_TIMESTEPS, Objective, Recipe
from ezhoi_diffusion.diffusion.schedule import Schedule
from ezhoi_diffusion.features.statistics import TABLE
from ezhoi_diffusion.files import current

BRIDGE = "diffusion"
MODEL, STATISTICS = "model.safetensors", "statistics.safetensors"
MAX_DIM, MAX_SCALE_FACTOR = 65536, 1e6


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
        for name, limit in (("dim", MAX_DIM), ("num_timesteps", MAX_TIMESTEPS)):
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"{name} must be a whole number from 1 to {limit}, not {getattr(self, name)}")
        if self.recipe.scale_factor > MAX_SCALE_FACTOR:
            raise ValueError(f"recipe {self.recipe.name!r}: scale_factor must be at most {MAX_SCALE_FACTOR:g}")
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
    artifact = Artifact.load(folder, BRIDGE, {MODEL: None, STATISTICS: TABLE})
    try:
        config = msgspec.convert(artifact.config, BridgeConfig)
        written = asdict(config)  # nothing may be left to a default: it would be another bridge's
        wrong = sorted(
            key for key in {*written, *artifact.config} if written.get(key, ...) != artifact.config.get(key, ...)
        )
        if wrong:
            raise ValueError(f"unexpected or missing entries in {', '.join(wrong)}")
    except (ValueError, msgspec.ValidationError) as error:
        raise BridgeError(
            f"{current(folder, CONFIG)} does not describe a diffusion bridge: {error}; {REMEDY}"
        ) from error
    return config, artifact

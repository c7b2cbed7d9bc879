"""Experiment trackers through accelerate: a training and its resumptions share one run in each tracker."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
from accelerate import tracking
from accelerate.utils import LoggerType

from ezhoi_diffusion.errors import attributed_to
from ezhoi_diffusion.files import write_atomic
from ezhoi_diffusion.training.config import TrainConfig, TrainingError

TRACKS = "trackers"
PROJECT = "ezhoi-diffusion"
RUN_ID = "run-id"


def require_trackers(log_with: Sequence[Any]) -> None:
    """Raise TrainingError for the name of a tracker that accelerate does not know, or whose package is not installed.

    Instances of accelerate.tracking.GeneralTracker pass.
    """
    installed = [str(name) for name in tracking.get_available_trackers()]
    for name in log_with:
        if isinstance(name, str) and name not in installed and not (name == "all" and installed):
            raise TrainingError(
                f"no tracker {name!r} is installed: accelerate knows {', '.join(sorted(LoggerType.list()))}, and of these "
                f"{', '.join(installed) or 'none'} can be used here. Install its package, or log without it"
            )


def start_trackers(accelerator: accelerate.Accelerator, config: TrainConfig, out: Path) -> None:
    """Begin a run in every tracker, or go on in the one that an earlier start in `out` began.

    TensorBoard and W&B write into `out`/trackers, the others where their own settings say.

    Raises:
        TrainingError: A tracker does not start.
    """
    if not accelerator.log_with:
        return
    folder = out / TRACKS
    folder.mkdir(exist_ok=True)
    begun = (folder / RUN_ID).exists()
    if not begun:
        write_atomic(folder / RUN_ID, uuid.uuid4().hex.encode())
    run_id = (folder / RUN_ID).read_text()
    wandb = {"dir": str(folder), "id": run_id, "name": out.resolve().name, "resume": "allow"}
    with attributed_to("starting a tracker (without --log-with none is needed)", TrainingError):
        accelerator.init_trackers(PROJECT, None if begun else _flat(config.to_dict()), {"wandb": wandb})


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, str | int | float]:
    """Flatten a configuration: trackers take no nesting and no lists."""
    flat: dict[str, str | int | float] = {}
    for name, value in content.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, (str, int, float)) else json.dumps(value)
    return flat

"""Training a bridge: the same result, to rounding, on any number of processes, interrupted or not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from ezhoi_diffusion.diffusion.artifact import CONFIG
from ezhoi_diffusion.diffusion.bridge import Components
from ezhoi_diffusion.errors import Interrupted
from ezhoi_diffusion.files import current, leftovers, locked
from ezhoi_diffusion.signals import asked_to_stop
from ezhoi_diffusion.training.config import TrainConfig, TrainingError
from ezhoi_diffusion.training.data import TrainingData
from ezhoi_diffusion.training.run import CHECKPOINTS, Run

__all__ = ["TrainConfig", "TrainingData", "TrainingError", "train"]


def train(
    data: TrainingData,
    config: TrainConfig,
    out: Path,
    *,
    registry: Components | None = None,
    resume: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Path:
    """Train a bridge into `out` and return it: the artefact of the last averaged weights, `best/` with the ones of
    the lowest validation loss, training.json and checkpoints/.

    With `resume` it goes on from the newest whole checkpoint, bit-equal on a CPU to a run that never stopped;
    train_steps may have grown. `on_step` is called after every step with the number of steps done. Under
    torchrun or `accelerate launch`, call it in every process.

    Asked to end by SIGTERM or SIGINT, it writes a checkpoint of the step it is at and raises Interrupted.

    Raises TrainingError where `out` is in use, the data, the device or the checkpoint do not fit the
    configuration, or the loss becomes NaN or infinite.
    """
    out = Path(out)
    finished, begun = current(out, CONFIG).exists(), (out / CHECKPOINTS).exists()
    if (finished or begun) and not resume:
        what = "a trained bridge" if finished else "an unfinished training"
        raise TrainingError(f"{out} holds {what}: resume it, or choose another folder")
    run = Run(data, config, out, registry)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{out} cannot be written ({error}): give another folder") from error
    try:
        with locked(out, TrainingError) if run.accelerator.is_main_process else nullcontext():
            for path in leftovers(out) if run.accelerator.is_main_process else ():
                path.unlink(missing_ok=True)
            if resume and not run.restore() and finished:
                raise TrainingError(f"{out} holds a trained bridge and no checkpoint to go on from")
            with run.progress(), asked_to_stop() as asked:
                while run.step < config.train_steps:
                    run.advance()
                    if on_step is not None:
                        on_step(run.step)
                    if run.stops(asked()):
                        run.stop()
                        raise Interrupted(
                            f"stopped after step {run.step} of {config.train_steps}, with a checkpoint of it in {out}: give the "
                            f"same command with --resume to go on"
                        )
                run.finish()
    except OSError as error:
        raise TrainingError(
            f"{out} could not take what the training writes ({error}): free space there and resume; checkpoints are kept"
        ) from error
    return out

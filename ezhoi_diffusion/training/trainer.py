"""Training a bridge: the same result, to rounding, on any number of processes, interrupted or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ezhoi_diffusion.artifact import CONFIG
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.diffusion.networks import CLOSED_FORMS
from ezhoi_diffusion.errors import Interrupted
from ezhoi_diffusion.files import current, leftovers, locked
from ezhoi_diffusion.signals import asked_to_stop
from ezhoi_diffusion.training.closed_form import fit_bridge
from ezhoi_diffusion.training.config import TrainConfig, TrainingError
from ezhoi_diffusion.training.data import TrainingData
from ezhoi_diffusion.training.loop import CHECKPOINTS, Run
from ezhoi_diffusion.training.processes import accelerator_for, broadcast_from_main
from ezhoi_diffusion.training.trackers import TRACKS, require_trackers, start_trackers

__all__ = ["TrainConfig", "TrainingData", "TrainingError", "train"]


def train(
    data: TrainingData,
    config: TrainConfig,
    out: Path,
    *,
    registry: Components | None = None,
    resume: bool = False,
    log_with: Sequence[Any] = (),
    on_step: Callable[[int], None] | None = None,
) -> Path:
    """Train a bridge into `out` and return it: the artefact of the averaged weights that had the lowest validation loss,
    training.json and checkpoints/. While it runs, best/ holds that artefact as it is so far.

    A validation at the end, off the rhythm of `val_every`, counts for this end alone: gone on with, a run gives the
    bridge of one that never ended.

    With `resume` it goes on from the newest whole checkpoint, bit-equal on a CPU to a run that never stopped.
    `patience` may differ, and train_steps may have grown unless the learning rate follows it. A run that ended
    early, resumed as it was, has nothing left to do. `log_with` names trackers that accelerate knows, or holds
    trackers of accelerate's kind; it is no part of the run's identity. `on_step` is called after every step with
    the number of steps done.

    Under torchrun or `accelerate launch`, call it in every process, and `ezhoi_diffusion.training.processes.exit_distributed` after it as
    the last thing. Only the main process reads and writes `out`.

    A denoiser that is a closed form is fitted instead; then there are neither checkpoints nor best/.

    Asked to end by SIGTERM or SIGINT, it writes a checkpoint of the step it is at and raises Interrupted.

    Raises TrainingError where `out` is in use, the data, the device or the checkpoint do not fit the
    configuration, a tracker is missing, or the loss becomes NaN or infinite.
    """
    out = Path(out)
    require_trackers(log_with)
    accelerator = accelerator_for(config, log_with, out / TRACKS)
    finished = broadcast_from_main(accelerator, lambda: _holds_a_bridge(out, resume))
    closed_form = config.denoiser in CLOSED_FORMS
    run = None if closed_form else Run(accelerator, data, config, out, registry)
    try:
        broadcast_from_main(accelerator, lambda: out.mkdir(parents=True, exist_ok=True))
    except OSError as error:
        raise TrainingError(f"{out} cannot be written ({error}): give another folder") from error
    held = ExitStack()
    try:
        broadcast_from_main(accelerator, lambda: _take(out, held))
        if run is None:
            broadcast_from_main(accelerator, lambda: fit_bridge(data, config, out, registry or Components()))
            return out
        if resume and not run.restore() and finished:
            raise TrainingError(f"{out} holds a trained bridge and no checkpoint to go on from")
        broadcast_from_main(accelerator, lambda: start_trackers(accelerator, config, out))
        with run.progress(), asked_to_stop() as asked:
            while not run.stopped:
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
    finally:
        # not accelerate's end_training, which would also part the processes for good
        for tracker in accelerator.trackers:
            tracker.finish()
        held.close()
    return out


def _take(out: Path, held: ExitStack) -> None:
    """Keep other trainings out of the folder as long as `held` is open, and clear away what a killed one left."""
    held.enter_context(locked(out, TrainingError))
    for path in leftovers(out):
        path.unlink(missing_ok=True)


def _holds_a_bridge(out: Path, resume: bool) -> bool:
    """Whether `out` does. Raises TrainingError where it holds anything of a training that is not to be resumed."""
    finished, begun = current(out, CONFIG).exists(), (out / CHECKPOINTS).exists()
    if (finished or begun) and not resume:
        what = "a trained bridge" if finished else "an unfinished training"
        raise TrainingError(f"{out} holds {what}: resume it, or choose another folder")
    return finished

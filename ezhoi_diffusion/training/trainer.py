"""Trains a bridge. The result is the same, to rounding, on any number of processes, interrupted or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ezhoi_diffusion.artifact import CONFIG
from ezhoi_diffusion.defaults import torch_defaults
from ezhoi_diffusion.diffusion.bridge import build_denoiser
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.diffusion.denoiser import FittedDenoiser
from ezhoi_diffusion.errors import Interrupted
from ezhoi_diffusion.files import current, leftovers, make_folder
from ezhoi_diffusion.locks import locked
from ezhoi_diffusion.signals import asked_to_stop
from ezhoi_diffusion.training.config import TrainConfig, TrainingError
from ezhoi_diffusion.training.data import TrainingData
from ezhoi_diffusion.training.fit_denoiser import fit_bridge
from ezhoi_diffusion.training.loop import CHECKPOINTS, TrainingLoop
from ezhoi_diffusion.training.processes import accelerator_for, broadcast_from_main
from ezhoi_diffusion.training.trackers import TRACKS, require_trackers, start_trackers

__all__ = ["TrainConfig", "TrainingData", "TrainingError", "train"]


@torch_defaults()
@torch.enable_grad()
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
    """Train a bridge into `out`; a FittedDenoiser is fitted instead.

    A search without the held-out features finds the step of the lowest validation loss. A refit then starts over and takes as
    many steps on all features. It costs at most as much as the search.

    `out` gets the artefact, training.json and checkpoints/. The artefact holds the averaged weights of the refit. Until then
    best/ holds those of the lowest validation loss. After a fit there are neither checkpoints nor best/.

    Under torchrun or `accelerate launch`, call it in every process, and then
    `ezhoi_diffusion.training.processes.exit_distributed` as the last thing. Only the main process reads and writes `out`.

    Args:
        data: What to learn from.
        config: How to train.
        out: A folder.
        registry: Denoisers and samplers; by default those that ship.
        resume: Go on from the newest complete checkpoint. On a CPU the result is bit-equal to that of a run that never
            stopped. `patience` may differ. So may train_steps, unless the learning rate follows it. A run that is finished
            has nothing left to do.
        log_with: Names of trackers that accelerate knows, or trackers of accelerate's kind. They may differ on resuming.
        on_step: Called after every step with the number of steps done, those of the search and the refit together.

    Returns:
        `out`.

    Raises:
        Interrupted: SIGTERM or SIGINT came. A checkpoint of the current step is written.
        TrainingError: `out` is in use, a tracker is missing, the loss is not finite, or the data, the device or the checkpoint
            do not fit the configuration.
    """
    out, registry = Path(out), registry or Components()
    require_trackers(log_with)
    accelerator = accelerator_for(config, log_with, out / TRACKS)
    finished = broadcast_from_main(accelerator, lambda: _holds_a_bridge(out, resume))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        denoiser = build_denoiser(config.bridge_config(data.statistics.dim), registry)
    loop = None
    if not isinstance(denoiser, FittedDenoiser):
        loop = TrainingLoop(accelerator, data, config, out, denoiser, registry)
    try:
        broadcast_from_main(accelerator, lambda: make_folder(out))
    except OSError as error:
        raise TrainingError(f"{out} cannot be written ({error}): give another folder") from error
    held = ExitStack()
    try:
        broadcast_from_main(accelerator, lambda: _take(out, held))
        if loop is None:
            broadcast_from_main(accelerator, lambda: fit_bridge(data, config, out, registry))
            return out
        if resume and not loop.restore() and finished:
            raise TrainingError(f"{out} holds a trained bridge and no checkpoint to resume from: choose another folder")
        broadcast_from_main(accelerator, lambda: start_trackers(accelerator, config, out))
        with asked_to_stop() as asked:
            _advance(loop, asked, on_step)
            loop.begin_refit()
            _advance(loop, asked, on_step)
            loop.finish()
    except OSError as error:
        raise TrainingError(
            f"{out} cannot be written ({error}): free space there and resume; checkpoints are kept"
        ) from error
    finally:
        # accelerate's end_training would also part the processes for good
        for tracker in accelerator.trackers:
            tracker.finish()
        held.close()
    return out


def _advance(loop: TrainingLoop, asked: Callable[[], bool], on_step: Callable[[int], None] | None) -> None:
    """Take the steps of a phase. Raises Interrupted, with a checkpoint written, once `asked` to stop."""
    with loop.progress():
        while not loop.stop_reason:
            loop.train_step()
            if on_step is not None:
                on_step(loop.steps_done)
            if loop.should_stop(asked()):
                loop.save_and_stop()
                raise Interrupted(
                    f"stopped after step {loop.step} of {loop.last_step} of the {loop.phase}, with a checkpoint in {loop.out}: "
                    f"run the same command with --resume to go on"
                )


def _take(out: Path, held: ExitStack) -> None:
    """Keep other trainings out of the folder while `held` is open, and remove what a killed one left."""
    held.enter_context(locked(out, TrainingError))
    for path in leftovers(out):
        path.unlink(missing_ok=True)


def _holds_a_bridge(out: Path, resume: bool) -> bool:
    """Whether `out` holds a finished bridge. Raises TrainingError where it holds a training that is not to be resumed."""
    finished, begun = current(out, CONFIG).exists(), (out / CHECKPOINTS).exists()
    if (finished or begun) and not resume:
        what = "a trained bridge" if finished else "an unfinished training"
        raise TrainingError(f"{out} holds {what}: resume it, or choose another folder")
    return finished

"""Run the steps of a pipeline that are not done, each as a process of its own."""

from __future__ import annotations

import ctypes
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ezhoi_diffusion.errors import Interrupted
from ezhoi_diffusion.files import make_folder
from ezhoi_diffusion.locks import locked
from ezhoi_diffusion.pipeline.record import INTERRUPTED, PipelineError, Record, Step


class StepFailed(PipelineError):
    """A step's command failed with `status`, after printing its own message."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status if status > 0 else 128 - status  # how a shell reports a signal


def run_steps(steps: Sequence[Step], out: Path) -> int:
    """Run what is not done yet, in order, and return how many steps ran.

    Raises:
        StepFailed: A step's command failed.
        Interrupted: SIGTERM came.
        PipelineError: `out` holds something else, is in use, or cannot be written.
    """
    try:
        make_folder(out)
        with locked(out, PipelineError):
            record = Record(out)
            return sum(
                [
                    _run_step(step, f"[{number}/{len(steps)}] {step.title}", record)
                    for number, step in enumerate(steps, 1)
                ]
            )
    except OSError as error:
        raise PipelineError(f"{out} cannot hold the pipeline's results ({error}): give another --out") from error


def _run_step(step: Step, head: str, record: Record) -> bool:
    """Run one step unless its result is there; return whether it ran."""
    reason = record.reason(step)
    if reason is None:
        print(f"{head}: up to date ({step.folder})", flush=True)
        return False
    if reason == INTERRUPTED and step.whole and step.folder.exists():
        print(f"{head}: was finished when it was interrupted ({step.folder})", flush=True)
        record.finish(step)
        return False
    print(f"{head}: {reason}", flush=True)
    record.begin(step, fresh=reason != INTERRUPTED)
    stop_requested = _run([*step.command, *(step.resume if step.folder.exists() else ())])
    record.finish(step)
    if stop_requested:
        raise Interrupted(f"stopped after step {step.name}: run the same command to continue")
    return True


def _run(command: Sequence[str]) -> bool:
    """Run a command of this package. Return whether SIGTERM came meanwhile. Raises StepFailed and Interrupted."""
    print(f"$ ezhoi-diffusion {shlex.join(command)}", flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "ezhoi_diffusion", *command],
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    with _forwarding_sigterm(process) as stop_requested:
        status = process.wait()
    again = f"run the same command to continue: ezhoi-diffusion {shlex.join(sys.argv[1:])}"
    if status in (Interrupted.status, -signal.SIGTERM) or (status and stop_requested()):
        raise Interrupted(f"stopped in `ezhoi-diffusion {command[0]}`; {again}")
    if status:
        raise StepFailed(
            f"`ezhoi-diffusion {command[0]}` failed with status {status}, see above. Fix the error and {again}", status
        )
    return stop_requested()


def _end_with_parent() -> None:
    """Ask Linux to send SIGTERM when the pipeline is killed, so that the step saves and ends too."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def _forwarding_sigterm(process: subprocess.Popen[bytes]) -> Iterator[Callable[[], bool]]:
    """Forward a scheduler's SIGTERM to the step, which saves its work; yields whether one came."""
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        process.terminate()

    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield lambda: bool(received)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)

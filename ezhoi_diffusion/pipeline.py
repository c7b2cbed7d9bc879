"""All steps in one go: what is done and still valid is skipped, what depends on something changed is done again.

A step's inputs are its configuration and the *contents* of the files it reads; its output is the content of the files it
wrote. Both are kept as digests in pipeline.json, so that a second run finds nothing to do, and says why where it does. A
result that is made anew is kept aside until the new one is there, and taken back if the old inputs come back before.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ezhoi_diffusion.errors import EzhoiDiffusionError, Interrupted
from ezhoi_diffusion.files import locked, read_json, sha256, write_json

STATE = "pipeline.json"
TRANSIENT = ("checkpoints", "trackers")  # parts of a step's folder that no later step reads
BEGUN = "goes on where it was interrupted"


class PipelineError(EzhoiDiffusionError):
    """A step failed, or the work folder is not a pipeline's."""


class StepFailed(PipelineError):
    """A step's command ended with `status`; its own message stands above."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status if status > 0 else 128 - status  # as a shell says that a signal ended it


@dataclass(frozen=True)
class Step:
    """One command of ours, the folder it fills, and what its result depends on.

    inputs: name -> value, as JSON; beside them counts the output of every step in `after`. again: flags with which
    an interrupted run of the command goes on.
    """

    name: str
    title: str
    folder: Path
    command: Sequence[str]
    inputs: Mapping[str, Any]
    after: Sequence[str] = ()
    again: Sequence[str] = field(default=())


def run_steps(steps: Sequence[Step], work: Path) -> int:
    """Run what is not done yet, in order; returns how many steps that were.

    Raises StepFailed at the first that fails, Interrupted on SIGTERM, and PipelineError where `work` holds something
    else, is in use, or cannot be written.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        state = _State(work)
        with locked(work, PipelineError):
            return sum(
                [_do(step, f"[{number}/{len(steps)}] {step.title}", state) for number, step in enumerate(steps, 1)]
            )
    except OSError as error:
        raise PipelineError(f"{work} cannot hold the pipeline's results ({error}): give another --out") from error


def _do(step: Step, head: str, state: _State) -> bool:
    """Run one step unless its result is there; whether it was run."""
    inputs = {**step.inputs, **{name: state.output(name) for name in step.after}}
    reason = state.reason(step, inputs)
    if reason is None:
        print(f"{head}: up to date ({step.folder})", flush=True)
        return False
    print(f"{head}: {reason}", flush=True)
    state.begin(step, inputs, anew=reason != BEGUN)
    asked = _run([*step.command, *(step.again if step.folder.exists() else ())])
    state.finish(step)
    if asked:
        raise Interrupted(f"stopped after step {step.name}: the same pipeline command goes on from there")
    return True


class _State:
    """pipeline.json: step -> its inputs when it was begun, once it is done its output and files, and what is kept aside."""

    def __init__(self, work: Path) -> None:
        self.work, self.path = work, work / STATE
        remedy = f"give another --out, or delete {work} to begin anew"
        if not self.path.exists() and any(not path.name.startswith(".") for path in work.iterdir()):
            raise PipelineError(f"{work} is not empty and holds no pipeline: give another --out")
        self.steps: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self.steps = read_json(self.path, PipelineError, remedy).get("steps", {})
            if not all(isinstance(step, dict) and "inputs" in step for step in self.steps.values()):
                raise PipelineError(f"{self.path} is no record of a pipeline; {remedy}")

    def output(self, name: str) -> str:
        return str(self.steps[name]["output"])

    def reason(self, step: Step, inputs: dict[str, Any]) -> str | None:
        """Why the step is to be run, or None."""
        record = self.steps.get(step.name)
        if record is None:
            if step.folder.exists():
                raise PipelineError(f"{step.folder} exists, and this pipeline did not make it: give another --out")
            return "not done yet"
        record = self._taken_back(step, record, inputs)
        then = record["inputs"]
        changed = sorted(key for key in {*then, *inputs} if then.get(key) != inputs.get(key))
        if changed:
            return f"done again, because of what changed: {', '.join(changed)}"
        if record.get("output") is None:
            return BEGUN
        if not step.folder.exists():
            return f"done again, because {step.folder} is gone"
        if tree_digest(step.folder, record["files"]) != record["output"]:
            return f"done again, because {step.folder} was changed since"
        return None

    def _taken_back(self, step: Step, record: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        """The record that counts: that of the result kept aside, where its inputs are back or nothing replaced it yet."""
        aside, kept = self._aside(step), record.get("aside")
        if not aside.exists():
            return record
        if record.get("output") is not None and not step.folder.exists():  # killed between two renames
            aside.rename(step.folder)
        elif kept is not None and kept["inputs"] == inputs:
            shutil.rmtree(step.folder, ignore_errors=True)
            aside.rename(step.folder)
            record = kept
            self._write(step.name, record)
        return record

    def begin(self, step: Step, inputs: dict[str, Any], *, anew: bool) -> None:
        """Note what the step is begun with; a finished result is kept aside, an unfinished one goes."""
        record = self.steps.get(step.name, {})
        kept = record.get("aside")
        if anew and step.folder.exists():
            if record.get("output") is None:
                shutil.rmtree(step.folder)
            else:
                shutil.rmtree(self._aside(step), ignore_errors=True)
                step.folder.rename(self._aside(step))
                kept = {key: record[key] for key in ("inputs", "output", "files")}
        self._write(step.name, {"inputs": inputs, "output": None, "aside": kept})

    def finish(self, step: Step) -> None:
        """Note what the step wrote; what was kept aside goes."""
        files = sorted(_own_files(step.folder))
        record = {"inputs": self.steps[step.name]["inputs"], "output": tree_digest(step.folder, files), "files": files}
        self._write(step.name, record)
        shutil.rmtree(self._aside(step), ignore_errors=True)

    def _aside(self, step: Step) -> Path:
        return self.work / f".old-{step.name}"

    def _write(self, name: str, record: dict[str, Any]) -> None:
        self.steps[name] = record
        write_json(self.path, {"steps": self.steps})


def _own_files(folder: Path) -> Iterator[str]:
    """Names of a step's files; hidden and transient ones do not count."""
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part in TRANSIENT or part.startswith(".") for part in parts):
            yield "/".join(parts)


def tree_digest(folder: Path, files: Iterable[str]) -> str | None:
    """SHA-256 over names and contents of some of a folder's files, None where one is missing."""
    digest = hashlib.sha256()
    for name in files:
        if not (folder / name).is_file():
            return None
        digest.update(f"{name} {sha256(folder / name)}\n".encode())
    return digest.hexdigest()


def content(value: Any, without: Path) -> Any:
    """What a flag's value stands for: the digest of a file; of a folder's files, names, sizes and times; or itself.

    without: a folder that does not count, because the pipeline writes into it.
    """
    try:
        path = Path(value) if isinstance(value, (str, Path)) and value else None
        if path is None or not path.exists():
            return json.loads(json.dumps(value, default=str))
        if path.is_file():
            return sha256(path)
    except (OSError, ValueError):  # a value that can be no path
        return str(value)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts and without.resolve() not in file.resolve().parents:
            facts = file.stat()  # a data set's images are too many to read
            digest.update(f"{file.relative_to(path)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _run(command: Sequence[str]) -> bool:
    """Run a command of ours; whether this process was asked to end meanwhile. Raises StepFailed, Interrupted."""
    print(f"$ ezhoi-diffusion {shlex.join(command)}", flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "ezhoi_diffusion", *command],
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    with _passing_on(process) as asked:
        status = process.wait()
    if status in (Interrupted.status, -signal.SIGTERM) or (status and asked()):
        raise Interrupted(
            f"stopped in `ezhoi-diffusion {command[0]}`: the same pipeline command goes on from there: ezhoi-diffusion "
            f"{shlex.join(sys.argv[1:])}"
        )
    if status:
        raise StepFailed(
            f"`ezhoi-diffusion {command[0]}` ended with status {status}, see above. Once that is mended, the same pipeline "
            f"command goes on from here: ezhoi-diffusion {shlex.join(sys.argv[1:])}",
            status,
        )
    return asked()


def _end_with_parent() -> None:
    """Ask Linux for a SIGTERM when the pipeline is killed, so that its step saves, ends, and is not left running unseen."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[Callable[[], bool]]:
    """A scheduler's SIGTERM is for the step, which then saves what it has; yields whether one came."""
    came: list[int] = []

    def forward(number: int, frame: Any) -> None:
        came.append(number)
        process.terminate()

    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield lambda: bool(came)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)

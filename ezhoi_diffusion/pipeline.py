"""All steps in one go: what is done and still valid is skipped, what depends on something changed is done again.

A step's inputs are its configuration and the *contents* of the files it reads; its output is the content of its folder.
Both are kept as digests in pipeline.json, so that a second run finds nothing to do, and says why where it does.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.files import read_json, sha256, write_json

STATE = "pipeline.json"
TRANSIENT = ("checkpoints", "trackers")  # parts of a step's folder that no later step reads


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

    Raises StepFailed at the first that fails, and PipelineError where `work` holds something else.
    """
    state = _State(work)
    done = 0
    for number, step in enumerate(steps, 1):
        head = f"[{number}/{len(steps)}] {step.title}"
        inputs = {**step.inputs, **{name: state.output(name) for name in step.after}}
        reason = state.reason(step, inputs)
        if reason is None:
            print(f"{head}: up to date ({step.folder})", flush=True)
            continue
        done += 1
        begun = reason == BEGUN
        print(f"{head}: {reason}", flush=True)
        if not begun and step.folder.exists():
            shutil.rmtree(step.folder)
        state.record(step.name, inputs, None)
        _run([*step.command, *(step.again if begun and step.folder.exists() else ())])
        state.record(step.name, inputs, tree_digest(step.folder))
    return done


BEGUN = "goes on where it was interrupted"


class _State:
    """pipeline.json: step -> its inputs when it was begun, and its output once it is done."""

    def __init__(self, work: Path) -> None:
        self.path = work / STATE
        remedy = f"delete it, and the pipeline in {work} begins anew"
        if not self.path.exists() and work.exists() and any(work.iterdir()):
            raise PipelineError(f"{work} is not empty and holds no pipeline: give another --work")
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
                raise PipelineError(f"{step.folder} exists, and this pipeline did not make it: give another --work")
            return "not done yet"
        then = record["inputs"]
        changed = sorted(key for key in {*then, *inputs} if then.get(key) != inputs.get(key))
        if changed:
            return f"done again, because of what changed: {', '.join(changed)}"
        if record.get("output") is None:
            return BEGUN
        if not step.folder.exists():
            return f"done again, because {step.folder} is gone"
        if tree_digest(step.folder) != record["output"]:
            return f"done again, because {step.folder} was changed since"
        return None

    def record(self, name: str, inputs: dict[str, Any], output: str | None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.steps[name] = {"inputs": inputs, "output": output}
        write_json(self.path, {"steps": self.steps})


def tree_digest(folder: Path) -> str:
    """SHA-256 over names and contents of a folder's files; hidden and transient ones do not count."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part in TRANSIENT or part.startswith(".") for part in parts):
            digest.update(f"{'/'.join(parts)} {sha256(path)}\n".encode())
    return digest.hexdigest()


def content(value: Any) -> Any:
    """What a flag's value stands for: the digest of a file, the list of a folder's files and sizes, or itself."""
    if not isinstance(value, (str, Path)) or not value or not Path(value).exists():
        return json.loads(json.dumps(value, default=str))
    path = Path(value)
    if path.is_file():
        return sha256(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
    return digest.hexdigest()


def _run(command: Sequence[str]) -> None:
    print(f"$ ezhoi-diffusion {shlex.join(command)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "ezhoi_diffusion", *command])
    with _passing_on(process):
        status = process.wait()
    if status:
        raise StepFailed(
            f"`ezhoi-diffusion {command[0]}` ended with status {status}, see above. Once that is mended, the same pipeline "
            f"command goes on from here: ezhoi-diffusion {shlex.join(sys.argv[1:])}",
            status,
        )


@contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A scheduler's SIGTERM is for the step, which then saves what it has."""
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        yield
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)

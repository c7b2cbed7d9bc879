"""The record of a pipeline: which steps are done, with which inputs, and what they wrote.

A step is done where its inputs (configuration, and contents of the files it reads) and the contents of its output are those of
the record. A finished result that has to be replaced is kept aside until the new one is there. If the old inputs come back
before that, the old result does too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.files import leftovers, read_json, sha256, write_json
from ezhoi_diffusion.schema import Sha256

FILE = "pipeline.json"
TRANSIENT = ("checkpoints", "trackers")  # parts of a step's folder that no later step reads
REMOVED = ".removed-"
INTERRUPTED = "continues where it was interrupted"


class PipelineError(EzhoiDiffusionError):
    """A step failed, or the folder is not a pipeline's."""


class Result(TypedDict):
    """What a step was made from and wrote; `output` is None until it is done."""

    inputs: dict[str, Any]
    output: Sha256 | None
    files: list[str]


class StepRecord(Result):
    """The newest result of a step, and the one that is kept aside."""

    kept: NotRequired[Result | None]


class PipelineFile(TypedDict):
    """pipeline.json."""

    steps: dict[str, StepRecord]


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: Its name in the record.
        title: What it does.
        folder: The folder that it fills.
        command: Words after `ezhoi-diffusion`.
        inputs: What its result depends on, name -> JSON.
        after: Names of steps whose output it reads.
        resume: Flags with which an interrupted command continues.
        whole: The command makes its folder whole or not at all, so a folder that is there is a result.
    """

    name: str
    title: str
    folder: Path
    command: Sequence[str]
    inputs: Mapping[str, Any]
    after: Sequence[str] = ()
    resume: Sequence[str] = ()
    whole: bool = False


class Record:
    """pipeline.json: name of a step -> its `inputs`, and once it is done `output` (a digest) and `files`.

    `kept` is the same for the result that is kept aside. Only the holder of the folder's lock may make a Record.

    Raises:
        PipelineError: The folder is another one's, or the record cannot be read.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._path = out, out / FILE
        remedy = f"give another --out, or delete {out} to start again"
        self._steps: dict[str, dict[str, Any]] = {}
        for path in (*leftovers(out), *out.glob(f"{REMOVED}*")):  # of a killed pipeline
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self._path.exists():
            self._steps = read_json(self._path, PipelineFile, PipelineError, remedy)["steps"]
        elif any(not path.name.startswith(".") for path in out.iterdir()):
            raise PipelineError(f"{out} is not empty and holds no pipeline: give another --out")

    def inputs(self, step: Step) -> dict[str, Any]:
        """Inputs of the step, with the output of the steps before it."""
        missing = [name for name in step.after if name not in self._steps]
        if missing:
            raise PipelineError(
                f"{self._path} lacks {', '.join(missing)}, which {step.name} reads: delete {self._out} to start again"
            )
        return {**step.inputs, **{name: str(self._steps[name]["output"]) for name in step.after}}

    def reason(self, step: Step) -> str | None:
        """Why the step has to run, or None. Puts a result back that was kept aside and is valid again."""
        if step.name not in self._steps:
            if step.folder.exists():
                raise PipelineError(f"{step.folder} exists, and this pipeline did not make it: give another --out")
            return "not done yet"
        inputs = self.inputs(step)
        self._put_back(step, inputs)
        record = self._steps[step.name]
        before = record["inputs"]
        changed = sorted(key for key in {*before, *inputs} if before.get(key) != inputs.get(key))
        if changed:
            return f"runs again, because of what changed: {', '.join(changed)}"
        if record["output"] is None:
            return INTERRUPTED
        if not step.folder.exists():
            return f"runs again, because {step.folder} is gone"
        if tree_digest(step.folder, record["files"]) != record["output"]:
            return f"runs again, because {step.folder} was changed since"
        return None

    def begin(self, step: Step, *, fresh: bool) -> None:
        """Note the step's inputs. A fresh start keeps a finished result aside, and deletes an unfinished one."""
        record = self._steps.get(step.name, {})
        kept = record.get("kept")
        if fresh and step.folder.exists():
            if record.get("output") is None:
                self._delete(step.folder)
            else:
                shutil.rmtree(self._aside(step), ignore_errors=True)
                step.folder.rename(self._aside(step))
                kept = {key: record[key] for key in ("inputs", "output", "files")}
        self._write(step, {"inputs": self.inputs(step), "output": None, "files": [], "kept": kept})

    def finish(self, step: Step) -> None:
        """Note what the step wrote, and delete what was kept aside."""
        files = sorted(_own_files(step.folder))
        inputs = self._steps[step.name]["inputs"]
        self._write(step, {"inputs": inputs, "output": tree_digest(step.folder, files), "files": files})
        shutil.rmtree(self._aside(step), ignore_errors=True)

    def _put_back(self, step: Step, inputs: Mapping[str, Any]) -> None:
        aside, record = self._aside(step), self._steps[step.name]
        if not aside.exists():
            return
        kept = record.get("kept")
        if kept is not None and kept["inputs"] == inputs:
            if step.folder.exists():
                self._delete(step.folder)
            self._write(step, kept)
            aside.rename(step.folder)
        elif record["output"] is not None and not step.folder.exists():  # killed between a rename and the record of it
            aside.rename(step.folder)
        elif record["output"] is not None:  # killed while `finish` deleted it
            shutil.rmtree(aside)

    def _delete(self, folder: Path) -> None:
        """Delete a folder. A kill leaves no part of it under its name."""
        removed = self._out / f"{REMOVED}{folder.name}"
        folder.rename(removed)
        shutil.rmtree(removed)

    def _aside(self, step: Step) -> Path:
        return self._out / f".old-{step.name}"

    def _write(self, step: Step, record: dict[str, Any]) -> None:
        self._steps[step.name] = record
        write_json(self._path, {"steps": self._steps})


def _own_files(folder: Path) -> Iterator[str]:
    """Names of a step's files, without hidden and transient ones."""
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part in TRANSIENT or part.startswith(".") for part in parts):
            yield "/".join(parts)


def tree_digest(folder: Path, files: Iterable[str]) -> str | None:
    """SHA-256 over names and contents of some files of a folder; None where one is missing."""
    digest = hashlib.sha256()
    for name in files:
        if not (folder / name).is_file():
            return None
        digest.update(f"{name} {sha256(folder / name)}\n".encode())
    return digest.hexdigest()


def content(value: Any, without: Path) -> Any:
    """The value of a flag, as an input of a step.

    Args:
        value: A file gives the digest of its contents. A folder gives a digest of names, sizes and times of its files, because
            the images of a data set are too many to read. Anything else gives itself, as JSON.
        without: A folder that does not count: the pipeline's own.
    """
    try:
        path = Path(value) if isinstance(value, (str, Path)) and value else None
        if path is None or not path.exists():
            return json.loads(json.dumps(value, default=str))
        if path.is_file():
            return sha256(path)
    except (OSError, ValueError):  # the value cannot be a path
        return str(value)
    digest, own = hashlib.sha256(), without.resolve()
    for file in sorted(path.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts and own not in file.resolve().parents:
            facts = file.stat()
            digest.update(f"{file.relative_to(path)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()

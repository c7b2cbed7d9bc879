"""Files and folders that are whole or absent: written aside, flushed to disk, renamed; read back with typed errors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError

STAGED = ".staged"
COMMITTED = ".committed"


def write_atomic(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, or leave it as it was. Raises OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file atomically; returns its name, size in bytes and SHA-256."""
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    write_atomic(path, data)
    return {"file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_json(path: Path, error: type[EzhoiDiffusionError], remedy: str) -> dict[str, Any]:
    """A JSON object from disk. Raises `error` where the file is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path} cannot be read ({problem}); {remedy}") from problem
    if not isinstance(value, dict):
        raise error(f"{path} holds {type(value).__name__}, not a JSON object; {remedy}")
    return value


def read_tensors(path: Path, error: type[EzhoiDiffusionError], remedy: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `error` where the file is missing, cut short or malformed."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as problem:
        raise error(f"{path} cannot be read ({problem}); {remedy}") from problem


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read in blocks. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `folder` by one rename if the block ends well.

    What an older `folder` held is lost. Parents are made.
    """
    staged = folder.with_name(folder.name + STAGED)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    yield staged
    shutil.rmtree(folder, ignore_errors=True)
    staged.rename(folder)
    sync_folder(folder.parent)


@contextmanager
def replaced_files(folder: Path) -> Iterator[Path]:
    """Yields a folder whose files replace those of the same names in `folder` together, or not at all.

    Other entries of `folder` stay. One rename commits. From then on `current` finds the new files, even if
    moving them into place was interrupted; the next call finishes that.
    """
    staged, committed = folder / STAGED, folder / COMMITTED
    _finish(folder)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    yield staged
    staged.rename(committed)
    sync_folder(folder)
    _finish(folder)


def current(folder: Path, name: str) -> Path:
    """Where the file `name` of a folder written by `replaced_files` is to be read."""
    committed = folder / COMMITTED / name
    return committed if committed.exists() else folder / name


def _finish(folder: Path) -> None:
    committed = folder / COMMITTED
    if committed.is_dir():
        for path in committed.iterdir():
            path.replace(folder / path.name)
        sync_folder(folder)
        committed.rmdir()

"""Files that are whole or absent: written aside, flushed to disk, renamed; and read back with typed errors."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError


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
    except (OSError, ValueError) as problem:
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

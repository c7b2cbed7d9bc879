"""Files and folders that are whole or absent: written aside, flushed to disk, renamed; read back with typed errors.

Whatever is read back has a hash. A JSON carries its own, as its last entry, and is read only if its bytes are those
that `write_json` wrote. A safetensors file has its size and hash in a JSON beside it.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ezhoi_diffusion.errors import EzhoiDiffusionError

STAGED, REPLACED = ".staged", ".replaced"
COMMITTED = ".committed"
LOCK = ".lock"
SEAL = "seal"
# Larger than anything this package writes: the index of ten times HICO-DET's images, a network of two billion weights.
MAX_JSON_BYTES, MAX_TENSORS_BYTES = 1 << 26, 1 << 33


def write_atomic(path: Path, data: bytes) -> dict[str, Any]:
    """Make `path` hold `data`, or leave it as it was; returns its name, size in bytes and SHA-256. Raises OSError."""
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
    return {"file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Write `value` and its seal as readable JSON, atomically; returns what `write_atomic` does."""
    return write_atomic(path, sealed(value))


def sealed(value: dict[str, Any]) -> bytes:
    """The one way in which a JSON object stands on disk."""
    data = io.BytesIO()
    for piece in _sealed_pieces(value):
        data.write(piece.encode())
    return data.getvalue()


def _sealed_pieces(value: dict[str, Any]) -> Iterator[str]:
    """`sealed`, a word at a time: an index has a million of them, and json.dumps would hold each one before it joins them."""
    seal = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    yield from json.JSONEncoder(indent=2).iterencode({**value, SEAL: seal})
    yield "\n"


def _is_sealed(text: str, value: dict[str, Any]) -> bool:
    at = 0
    for piece in _sealed_pieces(value):
        if not text.startswith(piece, at):
            return False
        at += len(piece)
    return at == len(text)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file, atomically; returns what `write_atomic` does."""
    return write_atomic(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def read_json(path: Path, error: type[EzhoiDiffusionError], remedy: str) -> dict[str, Any]:
    """A JSON object as `write_json` wrote it, without its seal.

    Raises `error` where the file is missing, too large, no such object, or not as it was written, be it by one space.
    """
    data = read_whole(path, MAX_JSON_BYTES, None, error, remedy)
    try:
        text = data.decode()
        del data  # an index is large
        value = json.loads(text)
        if not isinstance(value, dict):
            raise error(f"{path} holds {type(value).__name__}, not a JSON object; {remedy}")
        if value.pop(SEAL, None) is None:
            raise error(f"{path} has no seal: an older version wrote it, or it was edited; {remedy}")
        if not _is_sealed(text, value):
            raise error(f"{path} was changed after it was written; {remedy}")
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} cannot be read ({problem}); {remedy}") from problem
    return value


def read_bytes(path: Path, facts: dict[str, Any], error: type[EzhoiDiffusionError], remedy: str) -> bytes:
    """A file's content, as it was written. facts: what `write_tensors` returned. Raises `error` for any other content."""
    data = read_whole(path, MAX_TENSORS_BYTES, facts["bytes"], error, remedy)
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise error(f"{path} was changed after it was written; {remedy}")
    return data


def read_tensors(path: Path, facts: dict[str, Any], error: type[EzhoiDiffusionError], remedy: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; the file may change afterwards. For a moment it is in memory twice.

    facts: what `write_tensors` returned. Raises `error` where the file is missing, not as it was written, malformed,
    or holds NaN or infinity.
    """
    data = read_bytes(path, facts, error, remedy)
    try:
        tensors = load(data)
        broken = [name for name, x in tensors.items() if x.is_floating_point() and not torch.isfinite(x).all()]
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as problem:
        raise error(f"{path} cannot be read ({problem}); {remedy}") from problem
    if broken:
        raise error(f"{path}: {broken[0]} holds NaN or infinity; {remedy}")
    return tensors


def require_unchanged(path: Path, facts: dict[str, Any], error: type[EzhoiDiffusionError], remedy: str) -> None:
    """Raises `error` where a file is not as it was written. It is read in blocks, whatever its size.

    facts: what `write_tensors` returned.
    """
    with _opened(path, MAX_TENSORS_BYTES, facts["bytes"], error, remedy) as file:
        found = _digest(file)
    if found != facts["sha256"]:
        raise error(f"{path} was changed after it was written; {remedy}")


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read in blocks. Raises OSError."""
    with path.open("rb") as file:
        return _digest(file)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def read_whole(path: Path, limit: int, size: int | None, error: type[EzhoiDiffusionError], remedy: str) -> bytes:
    """A regular file's bytes, if they are at most `limit`, and `size` where that is known: size comes before memory.

    Raises `error` where they are not, or where there is no such file.
    """
    with _opened(path, limit, size, error, remedy) as file:
        return file.read(os.fstat(file.fileno()).st_size)


@contextmanager
def _opened(
    path: Path, limit: int, size: int | None, error: type[EzhoiDiffusionError], remedy: str
) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise error(f"{path} is not a file; {remedy}")
            if size not in (None, found.st_size):
                raise error(f"{path} has {found.st_size} bytes where {size!r} were written; {remedy}")
            if found.st_size > limit:
                raise error(f"{path} has {found.st_size} bytes, more than the {limit} of any such file; {remedy}")
            yield file
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read ({problem}); {remedy}") from problem


def _without_waiting(path: str, flags: int) -> int:
    """Open a pipe nobody writes to, as any other file."""
    return os.open(path, flags | os.O_NONBLOCK)


@contextmanager
def locked(folder: Path, error: type[EzhoiDiffusionError], name: str = LOCK, *, wait: bool = False) -> Iterator[None]:
    """Hold `folder`/`name` against other processes; the lock dies with its process, however that ends.

    Raises `error` where another process has it, unless it is to be waited for, and OSError.
    """
    path = folder / name
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            os.close(handle)
            raise error(f"another process is writing into {folder}: let it end, or give another folder") from None
        except OSError as problem:
            warnings.warn(f"{path} cannot be locked ({problem}): start only one writer for {folder}", stacklevel=3)
        if _is(handle, path):  # else its last holder has just removed it
            break
        os.close(handle)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def leftovers(folder: Path) -> list[Path]:
    """Files that `write_atomic` was killed over. Only for whoever may write there: another's may be in use."""
    return list(folder.glob(".*.tmp"))


def require_unused(folder: Path, error: type[EzhoiDiffusionError]) -> None:
    """Raises `error` where `folder` is a file, or holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise error(f"{folder} is in use: give a new folder with --out")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `folder` by a rename if the block ends well.

    What an older `folder` held is lost, but not before: it is moved aside for that rename, and removed after it. Parents
    are made.
    """
    put_back(folder)
    with _staged(folder.with_name(folder.name + STAGED)) as staged:
        yield staged
        if folder.is_dir():
            folder.rename(folder.with_name(folder.name + REPLACED))
        try:
            staged.rename(folder)
        except BaseException:
            put_back(folder)
            raise
    sync_folder(folder.parent)
    put_back(folder)


def put_back(folder: Path) -> None:
    """Give `folder` back where `new_folder` was killed between its two renames; remove what it replaced otherwise."""
    replaced = folder.with_name(folder.name + REPLACED)
    if not replaced.is_dir():
        return
    if folder.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(folder)
        sync_folder(folder.parent)


@contextmanager
def replaced_files(folder: Path) -> Iterator[Path]:
    """Yields a folder whose files replace those of the same names in `folder` together, or not at all.

    Other entries of `folder` stay. One rename commits. From then on `current` finds the new files, even if
    moving them into place was interrupted; the next call finishes that.
    """
    _finish(folder)
    with _staged(folder / STAGED) as staged:
        yield staged
        staged.rename(folder / COMMITTED)
    sync_folder(folder)
    _finish(folder)


@contextmanager
def _staged(staged: Path) -> Iterator[Path]:
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)  # a full disk needs the room
        raise


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


def check_writable(folder: Path) -> None:
    """Make the folder, and raise EzhoiDiffusionError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise EzhoiDiffusionError(
            f"{folder} cannot hold results ({error}): give another folder, or free space there"
        ) from error

"""Write files and folders whole or not at all, and read them back with typed errors.

Every write follows one protocol: stage beside the target, flush to disk (fsync), rename. A killed process leaves the old
content or the new. `put_back` and `replaced_files` finish what was interrupted between two renames.

Everything that is read back has a checksum. A JSON file has its own as its last entry. A safetensors file has its size and
SHA-256 in a JSON file beside it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ezhoi_diffusion.checksums import checksum_of, remember_checksum
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.locks import LOCK, locked
from ezhoi_diffusion.schema import all_finite, json_problem

STAGED, REPLACED = ".staged", ".replaced"
COMMITTED = ".committed"
CHECKSUM, JSON_END = "checksum", b'"\n}\n'  # the last entry of a JSON file, and what follows its 64 digits
UNKNOWN_TO_FILE_SYSTEM = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # SMB, folders shared with a virtual machine
# Larger than anything this package writes: the index of ten times HICO-DET's images, a network of two billion weights.
MAX_JSON_BYTES, MAX_TENSORS_BYTES = 1 << 26, 1 << 33


def write_atomic(path: Path, data: bytes) -> dict[str, Any]:
    """Make `path` hold `data`, or leave it as it was.

    Returns:
        The file's facts: `file` (its name), `bytes` and `sha256`.

    Raises:
        OSError: The disk refuses.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        staged.unlink(missing_ok=True)  # of a killed process of that number
        with open(staged, "xb", opener=_open_no_link) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            inode = os.fstat(file.fileno()).st_ino
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    digest, found = hashlib.sha256(data).hexdigest(), path.stat()
    if found.st_ino == inode:  # nobody has replaced it
        remember_checksum(found, digest)
    return {"file": path.name, "bytes": len(data), "sha256": digest}


def _open_no_link(path: str, flags: int) -> int:
    """Create a file; somebody else's link of that name is not followed."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut. Some file systems flush no folders."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNKNOWN_TO_FILE_SYSTEM:
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, and flush their entries. Without those, a power cut takes all that is stored inside."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in made:
        sync_folder(one.parent)


def write_json(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Write `value` with its checksum as readable JSON. Returns the file's facts, as `write_atomic` does."""
    return write_atomic(path, json_bytes(value))


def json_bytes(value: dict[str, Any]) -> bytes:
    """Return what `write_json` writes: the object, with the checksum of all bytes before it as the last entry."""
    data = io.BytesIO()
    # word by word: an index has a million, and json.dumps would hold them all before it joins them
    for piece in json.JSONEncoder(indent=2).iterencode({**value, CHECKSUM: ""}):
        data.write(piece.encode())
    head = data.getbuffer()[: 1 - len(JSON_END)]
    return b"".join([head, hashlib.sha256(head).hexdigest().encode(), JSON_END])


def _is_unchanged(data: bytes) -> bool:
    place = max(0, len(data) - 64 - len(JSON_END))
    return data[place:] == hashlib.sha256(memoryview(data)[:place]).hexdigest().encode() + JSON_END


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file. Returns the file's facts, as `write_atomic` does."""
    return write_atomic(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def read_json(path: Path, schema: Any, error: type[EzhoiDiffusionError], remedy: str) -> dict[str, Any]:
    """Read a JSON object that `write_json` wrote, without its checksum.

    Args:
        path: The file.
        schema: What it holds, as a TypedDict. Entries that it does not name may be anything.
        error: The type to raise.
        remedy: What the user can do; ends the message.

    Raises:
        error: The file is missing, too large, not such an object, or changed by as little as a space.
    """
    data = read_whole(path, MAX_JSON_BYTES, None, error, remedy)
    try:
        value = json.loads(data.decode())
        if not isinstance(value, dict):
            raise error(f"{path} holds {type(value).__name__}, not a JSON object; {remedy}")
        if value.pop(CHECKSUM, None) is None:
            raise error(f"{path} has no checksum: an older version wrote it, or it was edited; {remedy}")
        if not _is_unchanged(data):
            raise error(f"{path} was changed after it was written; {remedy}")
        wrong = json_problem(value, schema)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} cannot be read ({problem}); {remedy}") from problem
    if wrong:
        raise error(f"{path} has a wrong entry: {wrong}; {remedy}")
    return value


def read_bytes(path: Path, facts: dict[str, Any], error: type[EzhoiDiffusionError], remedy: str) -> bytes:
    """Read a file whose `facts` are known (see `write_atomic`). Raises `error` unless size and checksum fit.

    A checksum is computed once in a process, and again where the file was touched since.
    """
    with _opened(path, MAX_TENSORS_BYTES, facts["bytes"], error, remedy) as file:
        data = file.read(os.fstat(file.fileno()).st_size)
        found = os.fstat(file.fileno())
    if checksum_of(found) != facts["sha256"]:
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise error(f"{path} was changed after it was written; {remedy}")
        remember_checksum(found, facts["sha256"])
    return data


def read_tensors(path: Path, facts: dict[str, Any], error: type[EzhoiDiffusionError], remedy: str) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file onto the CPU. The file is in memory twice for a moment, and never mapped.

    Args:
        path: The file.
        facts: What `write_tensors` returned.
        error: The type to raise.
        remedy: What the user can do; ends the message.

    Raises:
        error: The file is missing, changed or malformed, or holds NaN or infinity.
    """
    data = read_bytes(path, facts, error, remedy)
    try:
        tensors = load(data)
        broken = [name for name, x in tensors.items() if x.is_floating_point() and not all_finite(x)]
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as problem:
        raise error(f"{path} cannot be read ({problem}); {remedy}") from problem
    if broken:
        raise error(f"{path}: {broken[0]} holds NaN or infinity; {remedy}")
    return tensors


def require_unchanged(path: Path, facts: dict[str, Any], error: type[EzhoiDiffusionError], remedy: str) -> None:
    """Raise `error` unless a file's size and checksum fit its `facts`, as in `read_bytes`. Reads in blocks, whatever the size."""
    with _opened(path, MAX_TENSORS_BYTES, facts["bytes"], error, remedy) as file:
        found = os.fstat(file.fileno())
        digest = checksum_of(found) or _digest(file)
    if digest != facts["sha256"]:
        raise error(f"{path} was changed after it was written; {remedy}")
    remember_checksum(found, digest)


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
    """Read a regular file. The size is checked before memory is taken.

    Args:
        path: The file.
        limit: The most bytes it may have.
        size: The bytes it must have, where that is known.
        error: The type to raise.
        remedy: What the user can do; ends the message.

    Raises:
        error: There is no such file, or it has another size.
    """
    with _opened(path, limit, size, error, remedy) as file:
        return file.read(os.fstat(file.fileno()).st_size)


@contextmanager
def _opened(
    path: Path, limit: int, size: int | None, error: type[EzhoiDiffusionError], remedy: str
) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb", opener=_open_nonblocking) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise error(f"{path} is not a regular file; {remedy}")
            if size not in (None, found.st_size):
                raise error(f"{path} has {found.st_size} bytes where {size!r} were written; {remedy}")
            if found.st_size > limit:
                raise error(f"{path} has {found.st_size} bytes, more than the limit of {limit}; {remedy}")
            yield file
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read ({problem}); {remedy}") from problem


def _open_nonblocking(path: str, flags: int) -> int:
    """Open a file; a pipe without a writer does not block."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_plain(path: Path) -> bytes:
    """Read a file that this package did not write. Raises OSError, also for a pipe or a device, which might never end."""
    with open(path, "rb", opener=_open_nonblocking) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return file.read()


def leftovers(folder: Path) -> list[Path]:
    """Staged files of killed `write_atomic` calls. Remove them only under the folder's lock: another's may be in use."""
    return list(folder.glob(".*.tmp"))


def require_unused(folder: Path, error: type[EzhoiDiffusionError]) -> None:
    """Raise `error` where `folder` is a file, or holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise error(f"{folder} is in use: give a new folder with --out")


def check_writable(folder: Path) -> None:
    """Make the folder, and raise EzhoiDiffusionError where nothing can be written there."""
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise EzhoiDiffusionError(
            f"{folder} cannot hold results ({error}): give another folder, or free space there"
        ) from error


@contextmanager
def new_result(folder: Path, error: type[EzhoiDiffusionError]) -> Iterator[Path]:
    """Yield a staged folder to write a result into, which becomes `folder` if the block ends without an error.

    Raises:
        error: `folder` is in use or a mount point, or somebody else is writing it.
        EzhoiDiffusionError: The disk refuses.
    """
    folder = folder.resolve()
    if folder.is_dir() and os.path.ismount(folder):
        raise error(f"{folder} is a mount point, which cannot be replaced: give a folder inside it")
    check_writable(folder.parent)
    with locked(folder.parent, error, f".{folder.name}{LOCK}", what=folder):
        put_back(folder)  # an empty folder that a killed writer moved aside
        require_unused(folder, error)
        with new_folder(folder) as staged:
            yield staged
            require_unused(folder, error)  # a training may have begun there meanwhile


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a staged folder to write into, and rename it to `folder` if the block ends without an error.

    An older `folder` is moved aside for the rename and removed after it. Parents are made.
    """
    put_back(folder)
    with _staged(folder.with_name(folder.name + STAGED)) as staged:
        yield staged
        _flush_all(staged)
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
    """Restore `folder` if `new_folder` was killed between its two renames; otherwise remove what was replaced."""
    replaced = folder.with_name(folder.name + REPLACED)
    if not replaced.is_dir():
        return
    if folder.exists():
        sync_folder(folder.parent)  # otherwise a power cut could bring the old name back, with nothing in it
        shutil.rmtree(replaced)
    else:
        replaced.rename(folder)
        sync_folder(folder.parent)


@contextmanager
def replaced_files(folder: Path) -> Iterator[Path]:
    """Yield a staged folder whose files replace those of the same names in `folder` together, or not at all.

    Other entries of `folder` stay. One rename commits. From then on `current` finds the new files, even if
    moving them into place was interrupted; the next call finishes the move.
    """
    _finish(folder)
    with _staged(folder / STAGED) as staged:
        yield staged
        _flush_all(staged)
        staged.rename(folder / COMMITTED)
    sync_folder(folder)
    _finish(folder)


@contextmanager
def _staged(staged: Path) -> Iterator[Path]:
    shutil.rmtree(staged, ignore_errors=True)
    make_folder(staged.parent)
    staged.mkdir()
    try:
        yield staged
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)  # a full disk needs the room
        raise


def _flush_all(folder: Path) -> None:
    """Flush all that a folder holds, whoever wrote it: a library, or a copy."""
    for path, _, names in os.walk(folder):
        for name in names:
            handle = os.open(Path(path) / name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(path))


def current(folder: Path, name: str) -> Path:
    """Return the path of the newest committed file `name` in a folder that `replaced_files` writes."""
    committed = folder / COMMITTED / name
    return committed if committed.exists() else folder / name


def _finish(folder: Path) -> None:
    committed = folder / COMMITTED
    if committed.is_dir():
        for path in committed.iterdir():
            path.replace(folder / path.name)
        sync_folder(folder)
        committed.rmdir()

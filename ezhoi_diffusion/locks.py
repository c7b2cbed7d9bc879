"""One writer of a folder at a time, among the threads of this process and among processes."""

from __future__ import annotations

import fcntl
import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ezhoi_diffusion.errors import EzhoiDiffusionError

LOCK = ".lock"
_HELD: set[tuple[str, str]] = set()  # locks of this process: folder and name
_GUARD = threading.Lock()


@contextmanager
def locked(
    folder: Path, error: type[EzhoiDiffusionError], name: str = LOCK, *, wait: bool = False, what: Path | None = None
) -> Iterator[None]:
    """Lock `folder`/`name` against other writers, in this process too. The lock ends with its process, however that ends.

    Args:
        folder: The folder to write into.
        error: The type to raise.
        name: The lock's file.
        wait: Wait for the lock instead of raising `error`.
        what: What is written, for the message; by default `folder`.

    Raises:
        error: Another writer holds the lock.
        OSError: The lock's file cannot be made.
    """
    path, refused = (
        folder / name,
        f"somebody else is writing into {what or folder}: wait for it, or give another folder",
    )
    own = (os.path.realpath(folder), name)
    while not _hold(own):
        if not wait:
            raise error(refused)
        time.sleep(0.02)
    try:
        handle = _lock(path, error, refused, wait=wait)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(handle)
    finally:
        _HELD.discard(own)


def _hold(own: tuple[str, str]) -> bool:
    """Note a lock as held by this process, unless it is: lockf locks out other processes only."""
    with _GUARD:
        if own in _HELD:
            return False
        _HELD.add(own)
        return True


def _lock(path: Path, error: type[EzhoiDiffusionError], refused: str, *, wait: bool) -> int:
    """Open and lock a file. Returns its handle."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # not flock, which processes that are forked meanwhile would go on to hold
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            os.close(handle)
            raise error(refused) from None
        except OSError as problem:
            warnings.warn(f"{path} cannot be locked ({problem}): start only one writer there", stacklevel=4)
        if _is_same_file(handle, path):  # otherwise its last holder has just removed it
            return handle
        os.close(handle)


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False

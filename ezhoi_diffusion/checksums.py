"""Checksums that this process has found, so that a file is hashed once however often it is read."""

from __future__ import annotations

import os
import time

_found: dict[tuple[int, ...], str] = {}  # version of a file -> SHA-256


def checksum_of(status: os.stat_result) -> str | None:
    """SHA-256 of the file with this status, if it is known and nobody has touched the file since."""
    return _found.get(_version(status))


def remember_checksum(status: os.stat_result, digest: str) -> None:
    """Remember the SHA-256 of a file. One of this very tick of the clock could change without a new time, and is not remembered."""
    coarse = getattr(time, "CLOCK_REALTIME_COARSE", None)  # the clock of Linux for the times of files
    now = time.time_ns() if coarse is None else time.clock_gettime_ns(coarse)
    if max(status.st_mtime_ns, status.st_ctime_ns) < now:
        _found[_version(status)] = digest


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

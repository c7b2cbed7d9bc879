"""Kill the own process, as kill -9 does, at its k-th call that changes a disk."""

from __future__ import annotations

import io
import itertools
import os
import signal

CALLS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "open")
real_open = io.open


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash_at(number: int) -> None:
    """Die before the call with this number; a write is cut in half first."""
    calls = itertools.count()

    def before(call):
        def wrapper(*args, **kwargs):
            if next(calls) == number:
                die()
            return call(*args, **kwargs)

        return wrapper

    def opened(file, mode="r", *args, **kwargs):
        handle = real_open(file, mode, *args, **kwargs)
        if "w" not in mode or "b" not in mode:
            return handle

        def write(data, real=handle.write):
            if next(calls) == number:
                real(data[: len(data) // 2])
                handle.flush()
                die()
            return real(data)

        class Torn:
            def __getattr__(self, name):
                return getattr(handle, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                handle.close()

        torn = Torn()
        torn.write = write
        return torn

    io.open = opened
    for name in CALLS:
        setattr(os, name, before(getattr(os, name)))

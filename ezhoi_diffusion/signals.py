"""A request to end, as a scheduler sends it before it kills: noticed between two units of work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGTERM or SIGINT (Ctrl-C) has come since; neither ends the process.

    A second SIGINT does, as ever. Outside the main thread, where no handler can be set, the answer stays False.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    before = _handle(note, signal.SIGTERM, signal.SIGINT)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def passed_to_children() -> Iterator[None]:
    """SIGTERM goes on to the processes that this one started, and ends it when the block has ended."""
    came: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for child in multiprocessing.active_children():
            child.terminate()

    before = _handle(forward, signal.SIGTERM)
    try:
        yield
    except SystemExit:
        came.clear()  # they have said how they ended
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            os.kill(os.getpid(), signal.SIGTERM)


def _handle(handler: Callable[[int, FrameType | None], None], *numbers: int) -> dict[int, signal._HANDLER]:
    """Set a handler where that is possible; returns the ones it replaced."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers}

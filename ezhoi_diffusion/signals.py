"""Handle SIGTERM and Ctrl-C between two units of work, as a scheduler sends them before it kills."""

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
    """Yield a function that returns whether SIGTERM or SIGINT (Ctrl-C) has come. Neither ends the process.

    A second SIGINT ends it as usual. Outside the main thread no handler can be set, and the function returns False.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    before = _handle(note, signal.SIGTERM, signal.SIGINT)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def passed_to_children() -> Iterator[None]:
    """Pass SIGTERM on to the processes that this one started; it ends this one when the block has ended."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for child in multiprocessing.active_children():
            child.terminate()

    before = _handle(forward, signal.SIGTERM)
    try:
        yield
    except SystemExit:
        received.clear()  # the children have reported how they ended
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            os.kill(os.getpid(), signal.SIGTERM)


def _handle(handler: Callable[[int, FrameType | None], None], *numbers: int) -> dict[int, signal._HANDLER]:
    """Set a handler in the main thread, nowhere else. Returns the handlers that it replaced."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers}

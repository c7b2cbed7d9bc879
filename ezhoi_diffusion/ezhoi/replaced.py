"""Set an attribute and put it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let `owner.name` be `value` inside the block.

    An attribute that `owner` did not hold itself (a method of its class) is removed again. One that somebody else
    replaced meanwhile stays theirs.
    """
    own = vars(owner)
    had, before = name in own, own.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if vars(owner).get(name) is value:
            if had:
                setattr(owner, name, before)
            else:
                delattr(owner, name)

"""Set an attribute and put it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let `owner.name` be `value` inside the block.

    Args:
        owner: An object, class or module.
        name: Name of the attribute. If `owner` only inherits it, the end of the block removes it again.
        value: If somebody else replaces it inside the block, their value stays.
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

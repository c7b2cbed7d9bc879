"""The control that changes nothing: a comparison in which it differs from `none` is broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor


def identity(adapter_feat: Tensor) -> Tensor:
    """[P, D] -> the same."""
    return adapter_feat


@hookimpl
def register_bridges(register: Callable[[str, Callable[[Path | None], Any]], None]) -> None:
    """Contribute `identity`."""
    register("identity", lambda folder: identity)

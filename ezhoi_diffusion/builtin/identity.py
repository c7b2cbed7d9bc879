"""The control that changes nothing: a comparison in which it differs from `none` is broken."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ezhoi_diffusion.bridge_plugin import BridgePlugin

if TYPE_CHECKING:
    from torch import Tensor


class Identity:
    """[P, D] -> the same."""

    row_by_row = True
    control = True

    def __call__(self, adapter_feat: Tensor) -> Tensor:
        """Rows as they are."""
        return adapter_feat


def load(folder: Path | None) -> Identity:
    """Whatever the folder."""
    return Identity()


plugin = BridgePlugin("identity", load)

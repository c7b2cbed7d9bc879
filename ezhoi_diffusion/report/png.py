"""Figures of matplotlib as PNG files, drawn without a display."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ezhoi_diffusion.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130


def png_bytes(figure: Figure, dpi: int = DPI) -> bytes:
    """Draw a figure as PNG. The same figure gives the same bytes."""
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=dpi, metadata={"Software": None})
    return picture.getvalue()


def save_png(figure: Figure, path: Path) -> None:
    """Draw a figure into the file `path`, which is replaced in one step."""
    write_atomic(path, png_bytes(figure))

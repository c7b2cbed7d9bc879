"""Figures of matplotlib as PNG files, drawn without a display."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.errors import described, printable
from ezhoi_diffusion.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130


def new_figure(**options: Any) -> Figure:
    """An empty figure with options of matplotlib's Figure. It needs no display, and none that MPLBACKEND names."""
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib as mpl  # that of a notebook would end the import outside of it
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend is not None:
        with suppress(ValueError):
            mpl.rcParams["backend"] = backend
    return Figure(**options)


def drawn(what: str, draw: Callable[[], object]) -> bool:
    """Draw a picture. Where it cannot be drawn, note it on standard error: the figures beside it are what counts."""
    try:
        draw()
    except Exception as error:  # of matplotlib, of its fonts, settings and cache
        sys.stderr.write(f"note: {what} could not be drawn ({printable(described(error))})\n")
        return False
    return True


def save_png(figure: Figure, path: Path) -> None:
    """Draw a figure into the file `path`, which is replaced in one step. The same figure gives the same bytes."""
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
    write_atomic(path, picture.getvalue())

"""Figures of matplotlib as PNG files, drawn without a display."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezhoi_diffusion.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130


def new_figure(**options: Any) -> Figure:
    """An empty figure with options of matplotlib's Figure. A display is never needed, and MPLBACKEND is not asked for one."""
    backend = os.environ.pop("MPLBACKEND", None)  # that of a notebook ends the import outside of it
    try:
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure(**options)


@contextmanager
def optional_picture(what: str) -> Iterator[None]:
    """Note on standard error where a picture cannot be drawn: the figures beside it are what counts. OSError passes."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # of matplotlib, or of its fonts and settings
        sys.stderr.write(f"note: {what} could not be drawn ({type(error).__name__}: {error})\n")


def png_bytes(figure: Figure, dpi: int = DPI) -> bytes:
    """Draw a figure as PNG. The same figure gives the same bytes."""
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=dpi, metadata={"Software": None})
    return picture.getvalue()


def save_png(figure: Figure, path: Path) -> None:
    """Draw a figure into the file `path`, which is replaced in one step."""
    write_atomic(path, png_bytes(figure))

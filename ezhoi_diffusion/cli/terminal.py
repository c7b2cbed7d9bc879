"""What goes to the terminal: tables, drawn by rich or plain in files and pipes, warnings, and nothing that moves the cursor."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from ezhoi_diffusion.errors import printable


def is_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout.isatty()


class _Escaped:
    """A text stream whose writes are made printable, colours included. `stream` is what it writes to."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.stream.write(printable(text))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


def accept_all_characters() -> None:
    """Print what the terminal's encoding lacks as escapes, instead of ending in a UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def escaped_stdout() -> Iterator[None]:
    """Print what files and plugins say, on stdout and in Python's own warnings, with escapes for control characters."""
    formatted = warnings.formatwarning
    with ExitStack() as undo:
        stream = sys.stdout or undo.enter_context(Path(os.devnull).open("w"))  # None where the shell has closed it
        undo.enter_context(redirect_stdout(_Escaped(stream)))
        undo.callback(setattr, warnings, "formatwarning", formatted)
        warnings.formatwarning = lambda *args, **kwargs: printable(formatted(*args, **kwargs))
        yield


class Parser(argparse.ArgumentParser):
    """A parser whose help and errors are escaped: they have names of plugins, and of files that a shell lists."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.color = False  # of Python 3.14, which colours its help

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(printable(message), file)


class _Warnings(logging.Handler):
    """Prints warnings of this package, unless the script that runs here has set up logging."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.root.handlers:
            sys.stderr.write(f"ezhoi-diffusion: {printable(self.format(record))}\n")


def log_warnings() -> None:
    """Print warnings of this package. The root logger is left to the script that runs here."""
    logger = logging.getLogger("ezhoi_diffusion")
    if not any(isinstance(handler, _Warnings) for handler in logger.handlers):
        logger.addHandler(_Warnings(logging.WARNING))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> None:
    """Print a table on stdout.

    Args:
        head: Titles of the columns.
        rows: Cells of each row, as many as titles.
        numbers: Positions of columns that are aligned to the right.
    """
    if is_terminal():
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False)
        for position, title in enumerate(head):
            table.add_column(title, justify="right" if position in numbers else "left")
        for row in rows:
            table.add_row(*map(printable, row))
        # past the escapes, for rich's own colours
        Console(file=getattr(sys.stdout, "stream", sys.stdout), markup=False, highlight=False).print(table)
        return
    widths = [max(len(row[position]) for row in [head, *rows]) for position in range(len(head))]
    for row in [head, *rows]:
        cells = [
            cell.rjust(width) if position in numbers else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    sys.stdout.flush()

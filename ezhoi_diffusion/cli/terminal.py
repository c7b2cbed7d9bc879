"""Tables for people: drawn by rich on a terminal, plain text in files and pipes."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def is_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout.isatty()


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
            table.add_row(*row)
        Console(markup=False, highlight=False).print(table)
        return
    widths = [max(len(row[position]) for row in [head, *rows]) for position in range(len(head))]
    for row in [head, *rows]:
        cells = [
            cell.rjust(width) if position in numbers else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    sys.stdout.flush()

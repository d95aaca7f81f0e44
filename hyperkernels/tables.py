"""Tables of the command line, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

WIDE = 120


def wide_console() -> Console:
    """As wide as the terminal; what is no terminal has no edge. It prints brackets as they are."""
    console = Console(markup=False, highlight=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, width=WIDE)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], bold: Sequence[bool] = ()) -> None:
    """Numbers stand at the right; in a narrow terminal a long cell goes on in the next line."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, *cells in zip(columns, *rows):
        number = all(cell[:1].isdigit() for cell in cells)
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row, strong in zip(rows, bold or [False] * len(rows)):
        table.add_row(*row, style="bold" if strong else None)
    wide_console().print(table)

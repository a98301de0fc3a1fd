"""What commands print: lines, tables and a progress bar over rows.

On a terminal tables and bars are drawn by rich; a pipe or a file gets plain columns and no bar.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from fusion.text import at_terminal, printable, shows_progress

Row = Sequence[str]


def say(text: str = "", file: TextIO | None = None, flush: bool = False) -> None:
    """Print text that may come from outside, on stdout by default."""
    print(printable(text), file=file or sys.stdout, flush=flush)


def show_table(rows: Sequence[Row]) -> None:
    """Print a table, titles first. Nothing in it is cut."""
    if not at_terminal(sys.stdout):
        say("\n".join(columns(rows)))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title, *cells in zip(*rows, strict=True):
        numeric = all(re.fullmatch(r"[-+\d.,]+", cell) for cell in cells)
        table.add_column(printable(title), overflow="fold", justify="right" if numeric else "left")
    for row in rows[1:]:
        table.add_row(*map(printable, row))
    Console(file=sys.stdout, highlight=False, markup=False, emoji=False).print(table)


def columns(rows: Sequence[Row]) -> list[str]:
    """The lines of a table in plain text: aligned columns, two spaces between them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def score(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) and not isinstance(value, bool) else "-"


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)


def formatted(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


@contextlib.contextmanager
def rows_progress(description: str, rows: int) -> Iterator[Callable[[int], None] | None]:
    """Draw a progress bar over rows inside the block. Yields what advances it, None where no bar is drawn."""
    if not shows_progress():
        yield None
        return
    from rich.markup import escape
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), transient=True) as progress:
        task = progress.add_task(escape(printable(" ".join(description.split()))), total=rows)
        yield lambda done: progress.advance(task, done)

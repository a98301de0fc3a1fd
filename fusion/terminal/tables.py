"""A table: rich's on a terminal, columns of plain text in a pipe. Nothing in it is cut."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

from fusion.terminal.screen import console_of, is_terminal, say, writable
from fusion.text import printable

Row = Sequence[str]
BETWEEN = 3  # columns of the terminal between two of a table


def show_table(rows: Sequence[Row], stream: TextIO | None = None) -> None:
    """
    Args:
        rows: the titles first. Numbers are put to the right. Words stay whole, so that a name can be copied.
        stream: None: stdout.
    """
    stream = sys.stdout if stream is None else stream
    if not is_terminal(stream):
        for line in plain(rows):
            say(line, stream)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = console_of(stream)
    rows = [[writable(printable(cell), stream) for cell in row] for row in rows]
    widths = fit(rows, console.width)
    if widths is None:
        for line in blocks(rows, console.width):
            console.print(Text(line), soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for (title, *cells), width in zip(zip(*rows, strict=True), widths, strict=True):
        numbers = any(map(_is_number, cells)) and all(_is_number(cell) or cell == "-" for cell in cells)
        table.add_column(Text(title), overflow="fold", justify="right" if numbers else "left", width=width)
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    console.print(table)


def fit(rows: Sequence[Row], width: int) -> list[int] | None:
    """A width for each column, such that all words are whole; None: there is no room for that."""
    from rich.cells import cell_len

    columns = list(zip(*rows, strict=True))
    least = [max([1, *(cell_len(word) for cell in column for word in cell.split())]) for column in columns]
    most = [max(1, *map(cell_len, column)) for column in columns]
    room = width - BETWEEN * (len(columns) - 1) - sum(least)
    if room < 0:
        return None
    for number in sorted(range(len(columns)), key=lambda n: most[n] - least[n]):
        more = min(room, most[number] - least[number])
        least[number], room = least[number] + more, room - more
    return least


def plain(rows: Sequence[Row]) -> list[str]:
    """Rows with their columns aligned, two spaces between them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def blocks(rows: Sequence[Row], width: int) -> list[str]:
    """For a terminal that is too narrow for the columns: the first cell, and the others below it."""
    titles, lines = rows[0], []
    for row in rows[1:]:
        lines.append(row[0])
        said = ", ".join(f"{title} {cell}" for title, cell in zip(titles[1:], row[1:], strict=True))
        lines += textwrap.wrap(
            said,
            max(20, width),
            initial_indent="    ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", ""))
    except ValueError:
        return False
    return True

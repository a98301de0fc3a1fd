"""What commands print (plain columns and no bar where there is no terminal), and programs without Hydra."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from fusion.errors import UserError
from fusion.runs import signals
from fusion.text import at_terminal, did_you_mean, printable, printable_output, shows_progress

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


# --- programs of plain words ----------------------------------------------------------------------


def run_program(words: Sequence[str] | None, usage: str, work: Callable[[Sequence[str]], int]) -> int:
    """Do the work with the command line (None: of this process); returns its exit code, 2 for a UserError."""
    given = sys.argv[1:] if words is None else words

    def run() -> int:
        if any(word in ("--help", "-h", "help") for word in given):
            print(usage, end="")
            return 0
        try:
            return work(given)
        except BrokenPipeError:  # `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except UserError as error:
            message = str(error)
        except OSError as error:
            message = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
        print(printable(message), file=sys.stderr)
        return 2

    printable_output()
    return signals.exit_code(run)


def read_arguments(
    words: Sequence[str], keys: Mapping[str, str], count: tuple[int, int], expected: str
) -> tuple[list[str], dict[str, str]]:
    """The names and the KEY=VALUE words of a command line, or UserError.

    Args:
        keys: each key with an example of its value, such as DIR.
        count, expected: the least and the most names, and what they are, for the message.
    """
    names: list[str] = []
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"\w+", key):  # a path may have a = in it
            names.append(word)
        elif key not in keys:
            known = ", ".join(f"{key}={example}" for key, example in keys.items())
            raise UserError(f"unknown key {key}{did_you_mean(key, keys, 0.7)}; expected {known}")
        elif key in values or not value:
            raise UserError(f"{word}: expected {key}={keys[key]}, once")
        else:
            values[key] = value
    if not count[0] <= len(names) <= count[1] or "" in names:
        given = " ".join(map(repr, names)) or "nothing"
        raise UserError(f"expected {expected}, not {given} (--help lists all arguments)")
    return names, values

"""Output of commands (plain columns and no progress bar outside a terminal), and programs without Hydra."""

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


def say(text: str = "", file: TextIO | None = None, flush: bool = False) -> None:
    """Print a string that may contain external text, by default on stdout."""
    print(printable(text), file=file or sys.stdout, flush=flush)


def show_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a table with titles in the first row, without truncating cells."""
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


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a plain-text table: aligned columns separated by two spaces."""
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
    """Draw a progress bar inside the block. Yields a callable that advances it, or None without a bar."""
    if not shows_progress():
        yield None
        return
    from rich.markup import escape
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), transient=True) as progress:
        task = progress.add_task(escape(printable(" ".join(description.split()))), total=rows)
        yield lambda done: progress.advance(task, done)


def run_program(words: Sequence[str] | None, usage: str, work: Callable[[Sequence[str]], int]) -> int:
    """Run a program with the given words or `sys.argv`. Returns the exit code, 2 for a UserError."""
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
    """Parse the positional and the KEY=VALUE arguments of a command line. Raises UserError for invalid arguments.

    `keys` has an example for each allowed key, such as DIR; `expected` describes the positional arguments.
    """
    names: list[str] = []
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"\w+", key):  # a path may contain =
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

"""Whether somebody looks on: rich's console for a terminal, plain text for everything else."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

from fusion.text import printable

if TYPE_CHECKING:
    from rich.console import Console


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that can move its cursor; no variable turns a pipe or a file into one."""
    try:
        return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    except (AttributeError, ValueError):  # no such method; closed
        return False


def console_of(stream: TextIO) -> Console:
    """rich's console on a terminal. NO_COLOR takes the colours out of it.

    The cursor is never hidden: so nothing, not even SIGKILL, can leave a terminal without one.
    """
    from rich.console import Console

    class Plain(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False

    return Plain(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)


def writable(text: str, stream: TextIO) -> str:
    """Text in which what the stream's encoding has no sign for is written as an escape."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str = "", stream: TextIO | None = None, flush: bool = False) -> None:
    """Print a line of text that may come from outside: on stdout, unless a stream is given."""
    stream = sys.stdout if stream is None else stream
    print(writable(printable(text), stream), file=stream, flush=flush)

"""Text from outside (manifests, data values, file names, a hub's answers) as a terminal or a log may show it.

Whatever is printed passes through `printable`, which escapes control characters (terminal escape sequences among
them), bidirectional controls and lone surrogates. The other functions also bound the length, or keep to one line.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Iterable
from typing import Any

SHOWN = 60  # characters of a value or a name in a message
NAMES = 20  # names in a message
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = SHOWN


def printable(text: str) -> str:
    """`text` with everything but printable characters, tabs and line feeds written as an escape."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


def one_line(text: str) -> str:
    """`printable` text on a single line: runs of white space become one space."""
    return printable(" ".join(text.split()))


def quotable(text: str, most: int = 600) -> str:
    """`printable` text of a bounded length: the middle of a longer one is left out."""
    text = printable(text)
    return text if len(text) <= most else f"{text[: most - 200]} … {text[-200:]}"


def shown(value: Any) -> str:
    """A raw value for a message, with its type."""
    if value is None:
        return "null"
    text = _short.repr(value)  # bounded in depth and length
    return f"{printable(text if len(text) <= SHOWN else text[: SHOWN - 3] + '...')} ({type(value).__name__})"


def listed(names: Iterable[str]) -> str:
    """Names for a message, on one line: a bounded number, each of a bounded length."""
    every = list(names)
    words = [
        name if name.isprintable() and len(name) <= SHOWN else _short.repr(name) for name in every[:NAMES]
    ]
    if len(every) > NAMES:
        words.append(f"and {len(every) - NAMES} more")
    return ", ".join(words) or "nothing"


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())


def printable_logs() -> None:
    """Make every log message of this process `printable`, on the terminal and in run.log."""
    logging.setLogRecordFactory(_PrintableRecord)

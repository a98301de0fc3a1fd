"""What is to be seen on a terminal after a text was written to it: enough of one for rich's live region."""

from __future__ import annotations

import io
import re
import sys

import pytest

from fusion.terminal import bars, display

TOKEN = re.compile(r"\x1b\[(\??)([\d;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+|\x1b")


class Terminal(io.StringIO):
    """A stream that says it is a terminal; `screen` is what somebody sees."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        return seen(self.getvalue())


def seen(text: str, width: int = 10_000) -> list[str]:
    """The lines of a screen, without what is blank at their ends and below."""
    lines, row, column = [""], 0, 0
    for token in TOKEN.finditer(text):
        word = token[0]
        if token[3] is not None:
            count = int(token[2].split(";")[0] or 1) if token[2].isdecimal() or not token[2] else 1
            if token[3] == "A":
                row = max(0, row - count)
            elif token[3] == "K":
                assert token[2] == "2", f"{word!r} is not known here"
                lines[row] = ""
            elif token[3] not in "mhl":
                raise AssertionError(f"{word!r} is not known here")
        elif word == "\r":
            column = 0
        elif word == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + word + line[column + len(word) :]
            column += len(word)
    lines = [line.rstrip() for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def look_on(monkeypatch: pytest.MonkeyPatch, terminal: Terminal, width: int = 120) -> None:
    """Makes a terminal of stdout and stderr. To be called within a test: pytest sets its own before it."""
    for name in (
        "NO_COLOR",
        "FORCE_COLOR",
        "TTY_COMPATIBLE",
        "TTY_INTERACTIVE",
        bars.SWEEP,
        display.PROGRESS,
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(display, "INTERVAL", 0.0)

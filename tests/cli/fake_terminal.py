"""stdout and stderr as a terminal, for what is drawn on terminals only."""

from __future__ import annotations

import io
import re
import sys

import pytest


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        """What was written, without control sequences."""
        return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", self.getvalue())


def at_terminal(monkeypatch: pytest.MonkeyPatch, width: int = 120) -> Terminal:
    """Make a terminal of both streams. Call it within a test: pytest sets its own streams before."""
    terminal = Terminal()
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FUSION_PROGRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal

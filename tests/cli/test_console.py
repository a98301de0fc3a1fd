"""Tables, lines and progress bars: on a terminal, and in a pipe."""

from __future__ import annotations

import logging
import re
import sys

import pytest

from fusion.cli.console import columns, rows_progress, say, show_table
from fusion.text import ConsoleHandler
from tests.cli.fake_terminal import at_terminal

ROWS = [
    ("name", "score", "what"),
    ("rte-adapterfusion-seed-1", "0.5271", "adapterfusion of 3"),
    ("cb", "0.5", "[red]two[/red] \x1b[2J"),
]


def test_a_pipe_gets_plain_columns(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "name                      score   what",
        "rte-adapterfusion-seed-1  0.5271  adapterfusion of 3",
        "cb                        0.5     [red]two[/red] \\x1b[2J",
    ]
    assert columns(ROWS)[0] == "name                      score   what"


@pytest.mark.parametrize("width", [24, 60, 200])
def test_a_terminal_gets_a_table_with_nothing_cut(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    terminal = at_terminal(monkeypatch, width)
    show_table(ROWS)
    lines = terminal.text.splitlines()
    assert all(len(line) <= width for line in lines) and "─" in terminal.text
    if width == 200:
        titles, _, first, second = lines
        assert titles.split() == ["name", "score", "what"]
        assert second.index("0.5 ") + 3 == first.index("0.5271") + 6  # numbers are on the right
    shown = sorted("".join(terminal.text.split()).replace("─", ""))
    assert shown == sorted("".join("".join(row) for row in ROWS).replace(" ", "").replace("\x1b", "\\x1b"))


def test_say_escapes_untrusted_text(capsys: pytest.CaptureFixture[str]) -> None:
    say("\x1b[2Jfilms")
    say("tab\tand\nline", sys.stderr)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("\\x1b[2Jfilms\n", "tab\tand\nline\n")


def test_progress_is_counted_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    log = logging.getLogger("tests.console")
    log.propagate = False
    log.addHandler(ConsoleHandler())
    try:
        with rows_progress("rte on [rows].jsonl", 2000) as advance:
            assert advance is not None
            advance(1500)
            log.warning("a line above the bar")
            assert sys.stdout is not terminal
    finally:
        log.handlers.clear()
    assert "rte on [rows].jsonl" in terminal.text and "1500/2000" in terminal.text
    assert re.search(r"\ra line above the bar *\n", terminal.text)
    assert sys.stdout is terminal


@pytest.mark.parametrize("how", ["pipe", "file for stderr", "dumb", "switched off"])
def test_no_progress_bar_without_a_terminal(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    real, terminal = sys.stderr, at_terminal(monkeypatch)
    if how == "pipe":
        monkeypatch.setattr(terminal, "isatty", lambda: False)
        monkeypatch.setenv("FORCE_COLOR", "1")  # colours may be wanted in a file; a bar cannot be read there
    elif how == "file for stderr":
        monkeypatch.setattr(sys, "stderr", real)
    elif how == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    else:
        monkeypatch.setenv("FUSION_PROGRESS", "0")
    with rows_progress("rte", 2) as advance:
        assert advance is None
    assert terminal.getvalue() == ""

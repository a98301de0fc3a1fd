"""A table for people, and the same one for a pipe."""

from __future__ import annotations

import io
import sys

import pytest

from fusion.terminal.tables import blocks, fit, plain, show_table
from tests.terminal.emulator import Terminal

ROWS = [
    ("name", "score", "what"),
    ("rte-adapterfusion-seed-1", "0.5271", "adapterfusion of 3"),
    ("cb", "-", "one two three"),
]


def test_plain() -> None:
    assert plain(ROWS) == [
        "name                      score   what",
        "rte-adapterfusion-seed-1  0.5271  adapterfusion of 3",
        "cb                        -       one two three",
    ]


def test_a_pipe_gets_the_plain_one(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(ROWS)
    assert capsys.readouterr().out.splitlines() == plain(ROWS)


def test_a_stream_that_knows_only_ascii_gets_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    show_table([("name",), ("größe",)], stream)
    stream.flush()
    assert raw.getvalue() == b"name\ngr\\xf6\\xdfe\n"


def test_a_terminal_that_knows_only_ascii(terminal: Terminal) -> None:
    terminal._encoding = "ascii"
    show_table([("name", "score"), ("größe", "0.5")])
    assert terminal.getvalue().isascii() and "gr\\xf6\\xdfe" in terminal.getvalue()
    assert set(terminal.screen[1]) <= set("-+| ")


def test_a_terminal_with_room(terminal: Terminal) -> None:
    show_table(ROWS)
    titles, line, first, second = terminal.screen
    assert titles.split() == ["name", "score", "what"] and set(line) == {"─"}
    assert first.split() == ["rte-adapterfusion-seed-1", "0.5271", "adapterfusion", "of", "3"]
    assert second.index("-") == first.index("0.5271") + 5  # numbers are to the right


@pytest.mark.parametrize("width", [5, 30, 44, 45, 50, 54, 60, 200])
def test_words_stay_whole_at_every_width(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    show_table(ROWS)
    words = [word for line in terminal.screen for word in line.split()]
    for cell in [cell for row in ROWS for cell in row][1:]:  # a block needs no title
        assert {word.rstrip(",") for word in words} >= set(cell.split())
    if width >= 50:  # 24 + 6 + 13 + 2 * 3 = 49 would do
        assert all(len(line) <= width for line in terminal.screen)


def test_the_room_goes_where_it_is_needed() -> None:
    assert fit(ROWS, 200) == [24, 6, 18]
    assert fit(ROWS, 54) == [24, 6, 18]
    assert fit(ROWS, 50) == [24, 6, 14]
    assert fit(ROWS, 49) == [24, 6, 13]
    assert fit(ROWS, 48) is None


def test_blocks() -> None:
    assert blocks(ROWS, 34) == [
        "rte-adapterfusion-seed-1",
        "    score 0.5271, what",
        "    adapterfusion of 3",
        "cb",
        "    score -, what one two three",
    ]


def test_brackets_are_no_markup(terminal: Terminal) -> None:
    show_table([("setting", "[a]"), ("task.labels", '["no", "[red]yes[/red]"]')])
    assert "[red]yes[/red]" in terminal.screen[-1] and "[a]" in terminal.screen[0]
    assert sys.stdout is terminal

"""The region at the foot of the terminal: what is written goes above it, and nothing of it stays."""

from __future__ import annotations

import io
import logging
import os
import sys

import pytest
from rich.text import Text

from fusion.terminal.display import Display, close, display
from fusion.terminal.screen import is_terminal
from tests.terminal.emulator import Terminal


def shown() -> Display:
    found = display()
    assert found is not None
    return found


def test_lines_go_above_the_region_and_the_region_goes(terminal: Terminal) -> None:
    print("before")
    part = Text("the bar")
    shown().add(part)
    assert terminal.screen == ["before", "the bar"]
    print("one")
    print("of stderr", file=sys.stderr)
    assert terminal.screen == ["before", "one", "of stderr", "the bar"]
    second = Text("another")
    shown().add(second)
    print("two")
    assert terminal.screen == ["before", "one", "of stderr", "two", "the bar", "another"]
    shown().remove(part)
    assert terminal.screen == ["before", "one", "of stderr", "two", "another"]
    shown().remove(second)
    print("after")
    assert terminal.screen == ["before", "one", "of stderr", "two", "after"]
    assert sys.stdout is terminal and sys.stderr is terminal


def test_the_cursor_is_never_hidden(terminal: Terminal) -> None:
    shown().add(Text("the bar"))
    print("a line")
    close()
    assert "\x1b[?25" not in terminal.getvalue() and "\x1b[2K" in terminal.getvalue()


def test_log_handlers_write_above_the_region_whenever_they_were_made(terminal: Terminal) -> None:
    log = logging.getLogger("tests.terminal")
    log.setLevel(logging.INFO)
    log.propagate = False
    old = logging.StreamHandler(sys.stdout)
    log.addHandler(old)
    try:
        shown().add(Text("the bar"))
        log.addHandler(made_meanwhile := logging.StreamHandler(sys.stderr))
        log.info("once a handler")
        assert terminal.screen == ["once a handler", "once a handler", "the bar"]
        close()
        log.info("later")
        assert terminal.screen == ["once a handler", "once a handler", "later", "later"]
        assert old.stream is terminal and made_meanwhile.stream is terminal
    finally:
        log.handlers.clear()


def test_long_lines_are_not_broken_and_colours_are_kept(terminal: Terminal) -> None:
    shown().add(Text("the bar"))
    path = "/".join(["folder"] * 60)
    print(path)
    print("\x1b[31mred\x1b[0m [bold]not markup[/bold] :smile:")
    assert terminal.screen == [path, "red [bold]not markup[/bold] :smile:", "the bar"]
    assert "\x1b[31mred" in terminal.getvalue()


def test_a_line_that_is_written_over_comes_once(terminal: Terminal) -> None:
    """As other people's bars do it, without knowing of ours."""
    shown().add(Text("the bar"))
    for percent in (10, 50, 100):
        sys.stderr.write(f"\rloading {percent} %")
        sys.stderr.flush()
    assert terminal.screen == ["the bar"]
    sys.stderr.write("\n")
    assert terminal.screen == ["loading 100 %", "the bar"]
    sys.stdout.write("begun and not ended")
    close()
    assert terminal.screen == ["loading 100 %", "begun and not ended"]


def test_it_is_hidden_for_a_while(terminal: Terminal) -> None:
    shown().add(Text("the bar"))
    with shown().hidden():
        assert terminal.screen == [] and sys.stdout is terminal
        print("somebody else")
    assert terminal.screen == ["somebody else", "the bar"]


@pytest.mark.parametrize("how", ["pipe", "dumb", "closed", "forced", "unwanted"])
def test_nothing_is_drawn_where_nobody_looks(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    elif how == "closed":
        closed = open(os.devnull)  # noqa: SIM115
        closed.close()
        monkeypatch.setattr(sys, "stderr", closed)
    elif how == "unwanted":
        monkeypatch.setenv("FUSION_PROGRESS", "0")
        assert is_terminal(sys.stderr) and display() is None
        return
    else:
        monkeypatch.setattr(sys, "stderr", io.StringIO())
    if how == "forced":  # colours may be wanted in a file; a bar is nothing to be read there
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert display() is None and not is_terminal(sys.stderr)


def test_a_file_beside_a_terminal_gets_its_lines_as_they_are(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    shown().add(Text("the bar"))
    print("for the file")
    close()
    assert file.getvalue() == "for the file\n" and terminal.screen == []


def test_without_colours(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown().add(Text("the bar", style="red"))
    assert terminal.screen == ["the bar"] and "\x1b[31m" not in terminal.getvalue()


def test_a_terminal_that_is_gone_stops_nothing(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    shown().add(Text("the bar"))

    def gone(text: str) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(terminal, "write", gone)
    shown().refresh(now=True)
    close()
    assert sys.stdout is terminal


def test_a_forked_process_writes_by_itself(terminal: Terminal) -> None:
    """A worker of the data loader: it draws nothing, and waits for no lock of its parent's."""
    shown().add(Text("the bar"))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        drawn = len(terminal.getvalue())
        print("a word")
        said = terminal.getvalue()[drawn:]
        os.write(writer, f"{said!r} {display()}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    assert os.read(reader, 1000).decode() == "'a word\\n' None"
    os.close(reader)

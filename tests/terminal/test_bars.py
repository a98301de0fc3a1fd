"""What the bars say, at every width."""

from __future__ import annotations

import os
import re

import pytest

from fusion.terminal import bars
from tests.terminal.emulator import Terminal


def test_a_training_under_a_sweep(terminal: Terminal) -> None:
    bars.begin_sweep(8)
    sweep = bars.sweep_bar()
    assert sweep is not None
    for failed in (False, True):
        sweep.begins()
        sweep.ends(failed)
    sweep.begins()
    bar = bars.training_bar("rte", total=40, epochs=10)
    assert bar is not None
    bar.trains(4, 2, 500, 0.25)
    bar.trains(5, 2, 500, 0.25)
    bar.scores("accuracy", 0.5, 0.75)
    above, own = terminal.screen
    assert re.fullmatch(r"sweep \S+ job 3 of 8, 1 done, 1 failed", above)
    assert re.fullmatch(
        r"rte \S+ epoch 2/10 accuracy 0\.5000 \(best 0\.7500\) 2,000 tokens/s [-\d:]+ left", own
    )
    bar.close()
    assert terminal.screen == [above]
    bars.end_sweep()
    assert terminal.screen == [] and bars.sweep_bar() is None


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200])
def test_a_narrow_terminal_shows_less_and_never_two_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    bars.begin_sweep(3)
    bar = bars.training_bar("cb-adapterfusion", total=40, epochs=10)
    long = bars.training_bar("a-name-that-is-longer-than-a-terminal-has-room-for", total=40, epochs=1000)
    assert bar is not None and long is not None
    long.trains(5, 1000, 5_000_000, 0.25)
    long.scores("matthews_correlation", 0.5, 0.75)
    assert len(terminal.screen) == 3 and all(len(line) <= width for line in terminal.screen)
    long.close()
    bar.trains(5, 2, 5000, 0.25)
    bar.scores("macro_f1", 0.5, 0.75)
    screen = terminal.screen
    assert len(screen) == 2 and all(len(line) <= width for line in screen)
    assert "epoch 2/10" in screen[1] and ("left" in screen[1]) == (width >= 40)
    assert ("macro_f1 0.5000" in screen[1]) == (width >= 60)
    assert ("tokens/s" in screen[1]) == (width >= 100)
    assert ("best" in screen[1]) == (width >= 120)


def test_a_terminal_that_knows_only_ascii(terminal: Terminal) -> None:
    terminal._encoding = "ascii"
    bar = bars.training_bar("größe", total=40, epochs=10)
    assert bar is not None
    bar.trains(5, 2, 500, 0.25)
    print("a line – long")
    assert terminal.getvalue().isascii() and terminal.screen[0] == "a line \\u2013 long"
    assert "epoch 2/10" in terminal.screen[1]


def test_a_jobs_own_processes_are_told_how_the_sweep_stands(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars.begin_sweep(8)
    sweep = bars.sweep_bar()
    assert sweep is not None
    sweep.begins()
    sweep.ends(failed=True)
    sweep.begins()
    (before,) = terminal.screen
    with bars.handed_over():
        assert terminal.screen == []
        told = os.environ[bars.SWEEP]
    assert bars.SWEEP not in os.environ and terminal.screen == [before]
    bars.end_sweep()
    monkeypatch.setenv(bars.SWEEP, told)  # in a rank
    bar = bars.training_bar("rte", total=4, epochs=1)
    assert bar is not None
    above, own = terminal.screen
    assert above == before and own.startswith("rte ")
    bar.close()
    assert terminal.screen == []


def test_rows(terminal: Terminal) -> None:
    with bars.rows_bar("rte on rows.jsonl", 2000) as advance:
        assert advance is not None
        advance(1500, 9000)
        (line,) = terminal.screen
        assert re.fullmatch(r"rte on rows\.jsonl \S+ 1,500/2,000 rows [\d,]+ tokens/s [-\d:]+ left", line)
    assert terminal.screen == []
    with pytest.raises(RuntimeError), bars.rows_bar("rte", 2):
        raise RuntimeError
    assert terminal.screen == []


def test_on_no_terminal_there_are_none(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    bars.begin_sweep(3)
    with bars.rows_bar("rte", 2) as advance, bars.handed_over():
        assert advance is None and bars.sweep_bar() is None and bars.SWEEP not in os.environ
    assert bars.training_bar("rte", 4, 1) is None
    assert terminal.getvalue() == ""


def test_a_rate_is_that_of_the_last_batches() -> None:
    rate = bars.Rate()
    assert rate.shown() == ""
    rate.add(10_000_000, 1.0)
    for _ in range(bars.WINDOW):
        rate.add(100, 0.1)
    assert rate.shown() == "1,000 tokens/s"

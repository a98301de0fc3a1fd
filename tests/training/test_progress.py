"""The bar over a real training, as somebody at a terminal sees it, and what everybody else gets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fusion.config.training import OptimConfig, TrainerConfig
from fusion.terminal import bars, display
from fusion.training.progress import ProgressBar
from tests.bench import Bench
from tests.terminal.emulator import Terminal, look_on


def settings(**changes: object) -> TrainerConfig:
    return TrainerConfig(accelerator="cpu", max_epochs=2, enable_progress_bar=True, **changes)  # type: ignore[arg-type]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """What the bar was told: (completed, total), each time."""
    told: list[tuple[int, int]] = []

    class Spy(bars.TrainingBar):
        def __init__(self, name: str, total: int, epochs: int, shown: display.Display) -> None:
            super().__init__(name, total, epochs, shown)
            self.total = total

        def trains(self, completed: int, epoch: int, tokens: int, seconds: float) -> None:
            told.append((completed, self.total))
            super().trains(completed, epoch, tokens, seconds)

        def evaluates(self, completed: int) -> None:
            told.append((completed, self.total))
            super().evaluates(completed)

    monkeypatch.setattr(bars, "TrainingBar", Spy)
    yield told
    display.close()


def test_a_training_at_a_terminal(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, int]]
) -> None:
    terminal = Terminal()
    look_on(monkeypatch, terminal)
    bench.stage1("films", trainer=settings())
    drawn = [line for line in re.split(r"[\r\n]", terminal.getvalue()) if "epoch " in line]
    plain = [re.sub(r"\x1b\[[\d;]*m|\x1b\[2K", "", line) for line in drawn]
    assert plain[0].startswith("films ") and "epoch 1/2" in plain[0]
    assert re.search(r"epoch 2/2 accuracy [01]\.\d{4} \(best [01]\.\d{4}\) [\d,]+ tokens/s", plain[-1])
    assert terminal.screen == []  # of the bar nothing is left
    # 64 rows in batches of 8, and 16 more to score, twice
    assert [completed for completed, _ in calls] == list(range(1, 21))
    assert {total for _, total in calls} == {20}


def test_a_training_that_is_taken_up_goes_on_with_its_bar(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, int]]
) -> None:
    terminal = Terminal()
    look_on(monkeypatch, terminal)
    trains = bars.TrainingBar.trains

    def interrupted(bar: bars.TrainingBar, completed: int, *more: object) -> None:
        trains(bar, completed, *more)  # type: ignore[arg-type]
        if completed == 13:
            raise KeyboardInterrupt

    monkeypatch.setattr(bars.TrainingBar, "trains", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        bench.stage1("films", trainer=settings())
    assert terminal.screen == [] and display.display() is not None
    monkeypatch.setattr(bars.TrainingBar, "trains", trains)
    del calls[:]
    bench.stage1("films", trainer=settings())
    first = calls[0][0]
    assert 10 < first <= 14 and [completed for completed, _ in calls] == list(range(first, 21))


@pytest.mark.parametrize("how", ["switched off", "a pipe", "dumb"])
def test_nothing_is_drawn(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    terminal = Terminal()
    if how != "a pipe":
        look_on(monkeypatch, terminal)
    if how == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    config = (
        settings()
        if how != "switched off"
        else TrainerConfig(accelerator="cpu", max_epochs=1, enable_progress_bar=False)
    )
    bench.stage1("films", trainer=config, optim=OptimConfig(lr=5e-3))
    assert "\x1b" not in terminal.getvalue() and "tokens/s" not in terminal.getvalue()
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and "tokens/s" not in said.out + said.err


def test_only_the_first_process_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    look_on(monkeypatch, terminal)
    trainer: Any = SimpleNamespace(is_global_zero=False)
    callback = ProgressBar("films", "validation/accuracy")
    callback.on_train_start(trainer, cast(Any, None))
    callback.on_train_epoch_start()
    callback.on_train_batch_end(trainer, cast(Any, None), None, cast(Any, None), 0)
    callback.on_train_end()
    assert terminal.getvalue() == ""


def test_rows_are_counted_when_they_are_scored_and_predicted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench.stage1("films")
    done: list[int] = []
    advance = bars.RowsBar.advance

    def spy(bar: bars.RowsBar, rows: int, tokens: int) -> None:
        assert tokens >= rows
        done.append(rows)
        advance(bar, rows, tokens)

    monkeypatch.setattr(bars.RowsBar, "advance", spy)
    terminal = Terminal()
    look_on(monkeypatch, terminal)
    bench.evaluate("films", split="test")
    assert sum(done) == 8 and "8/8 rows" in terminal.getvalue()
    assert terminal.screen == [terminal.screen[0]] and terminal.screen[0].startswith(
        "films on films test (8 rows)"
    )
    del done[:]
    bench.predict("films", [{"text": "a good film"}] * 20)
    assert sum(done) == 20 and "20/20 rows" in terminal.getvalue()

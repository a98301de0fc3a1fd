"""The progress bar over a real training: what is drawn at a terminal, and nothing elsewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fusion.config.training import TrainerConfig
from tests.bench import Bench
from tests.cli.fake_terminal import at_terminal


def settings(epochs: int = 2, bar: bool = True) -> TrainerConfig:
    return TrainerConfig(accelerator="cpu", max_epochs=epochs, enable_progress_bar=bar)


def test_a_training_at_a_terminal(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    bench.stage1("films", trainer=settings())
    assert "Epoch 1/1" in terminal.text
    assert re.search(r"accuracy: [01]\.\d{4} best: [01]\.\d{4}", terminal.text)
    assert sys.stdout is terminal


@pytest.mark.parametrize("how", ["enable_progress_bar=false", "a pipe", "dumb"])
def test_nothing_is_drawn(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    if how != "a pipe":
        terminal = at_terminal(monkeypatch)
    if how == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    bench.stage1("films", trainer=settings(1, how != "enable_progress_bar=false"))
    captured = capsys.readouterr()
    drawn = captured.out + captured.err + ("" if how == "a pipe" else terminal.getvalue())
    assert "\x1b" not in drawn and "Epoch 0" not in drawn


def test_evaluation_and_prediction_show_progress(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench.stage1("films")
    terminal = at_terminal(monkeypatch)
    bench.evaluate("films", split="test")
    assert "8/8" in terminal.text and "films on films test (8 examples)" in terminal.text
    bench.predict("films", [{"text": "a good film"}] * 20)
    assert "20/20" in terminal.text

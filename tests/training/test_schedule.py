"""The number of epochs and evaluations of a run, and early stopping after the minimum number of steps."""

from __future__ import annotations

import logging
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest

from fusion.config.data import LimitConfig
from fusion.config.training import OptimConfig, TrainerConfig
from fusion.training import callbacks
from fusion.training.callbacks import Best, best_epoch
from fusion.training.fit import planned_epochs
from tests.bench import Bench


@pytest.mark.parametrize(
    ("batches", "optim", "trainer", "expected"),
    [
        (4, {"epochs": 10, "min_steps": 300}, {}, (80, 8, 75.0)),  # 75 epochs, and the last one is evaluated
        (100, {"epochs": 10, "min_steps": 300}, {}, (10, 1, 3.0)),
        (30, {"epochs": 10, "min_steps": 300}, {}, (10, 1, 10.0)),
        (29, {"epochs": 10, "min_steps": 300}, {}, (12, 2, 300 / 29)),
        (7, {"epochs": 3, "min_steps": 150}, {}, (24, 3, 150 / 7)),
        (7, {"epochs": 3, "min_steps": 20}, {}, (3, 1, 20 / 7)),
        (4, {"epochs": 30, "min_steps": 300}, {}, (75, 3, 75.0)),
        (4, {"epochs": 10, "min_steps": 0}, {}, (10, 1, 0.0)),
        (4, {"epochs": 10, "min_steps": 300}, {"accumulate_grad_batches": 3}, (150, 15, 150.0)),
        (400, {"epochs": 10, "min_steps": 300}, {"limit_train_batches": 0.01}, (80, 8, 75.0)),
        (400, {"epochs": 10, "min_steps": 300}, {"limit_train_batches": 4}, (80, 8, 75.0)),
        (4, {"epochs": 10, "min_steps": 20}, {"max_steps": 300}, (80, 8, 5.0)),
        (4, {"epochs": 10, "min_steps": 300}, {"check_val_every_n_epoch": 5}, (75, 5, 75.0)),
        (
            4,
            {"epochs": 10, "min_steps": 300},
            {"val_check_interval": 2, "check_val_every_n_epoch": None},
            (75, None, 75.0),
        ),
    ],
)
def test_planned_epochs(
    batches: int, optim: dict[str, Any], trainer: dict[str, Any], expected: tuple[int, int | None, float]
) -> None:
    assert planned_epochs(OptimConfig(**optim), TrainerConfig(**trainer), batches) == expected


@pytest.mark.parametrize(
    ("scores", "min_epochs", "expected"),
    [
        ([0.9, 0.5, 0.6, 0.6], 0.0, 2),
        ([0.9, 0.5, 0.6, 0.6], 4.0, 2 + 4),  # an evaluation at exactly the minimum counts, and the earliest one wins
        ([0.9, 0.5, 0.6, 0.6], 6.5, 8),
        ([0.9, 0.5, 0.7], 7.0, 2),  # a run that ended before the minimum
        ([], 7.0, None),
    ],
)
def test_the_best_epoch_is_selected_from_the_minimum_on(
    scores: list[float], min_epochs: float, expected: int | None
) -> None:
    history = [{"epoch": 2 * n, "accuracy": score} for n, score in enumerate(scores, 1)]
    assert best_epoch(history, "accuracy", min_epochs).get("epoch") == expected


def stopped_in(scores: list[float], every: int, min_epochs: float, patience: int = 2) -> int | None:
    """The epoch after which training stops, given the scores of the evaluated epochs."""
    best = Best("accuracy", patience)
    best.min_epochs = min_epochs
    trainer: Any = SimpleNamespace(should_stop=False, is_global_zero=False)
    for count in range(1, len(scores) + 1):
        history = [{"epoch": every * n, "accuracy": score} for n, score in enumerate(scores[:count], 1)]
        best._stop_early(trainer, SimpleNamespace(history=history))
        if trainer.should_stop:
            return every * count
    return None


def test_patience_counts_evaluations_after_the_minimum() -> None:
    falling = [0.9, *[0.5] * 9]
    assert stopped_in(falling, 1, 0) == 3
    assert stopped_in(falling, 1, 5.0) == 7  # the fifth epoch is the best of those from the fifth on
    assert stopped_in(falling, 1, 5.5) == 8
    assert stopped_in(falling, 2, 5.0) == 10
    assert stopped_in([0.5, 0.5, 0.9, 0.5, 0.5, 0.5], 1, 2.0) == 5
    assert stopped_in(falling, 1, 9.0) is None


def test_few_examples_are_trained_for_the_minimum_number_of_steps(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {
        "trainer": TrainerConfig(accelerator="cpu", enable_progress_bar=False),
        "data": bench.settings("films")["data"].__class__(**vars(bench.data) | {"limit": LimitConfig(train=16)}),
    }
    with caplog.at_level(logging.INFO):
        result = bench.stage1("films", optim=OptimConfig(lr=5e-3, epochs=4, min_steps=30), **settings)
    assert (result["epochs"], result["best_epoch"]) == (16, 16)  # the only evaluation from 15 epochs = 30 steps on
    assert "16 epochs of 2 batches, for optim.min_steps=30; evaluated every 2 epochs" in caplog.text
    lines = [message for message in caplog.messages if message.startswith("epoch ")]
    assert [line.partition("  ")[0] for line in lines] == [f"epoch {n}/16" for n in range(2, 17, 2)]
    assert "(best)" in lines[0] and "(best)" in lines[-1]
    exact = TrainerConfig(accelerator="cpu", enable_progress_bar=False, max_epochs=3)
    again = bench.stage1("films", name="exact", optim=OptimConfig(min_steps=30), **settings | {"trainer": exact})
    assert again["epochs"] == 3


def test_the_expected_time_of_a_longer_training_is_logged(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    trainer = TrainerConfig(accelerator="cpu", enable_progress_bar=False, max_epochs=5)
    bench.stage1("films", name="short", trainer=trainer)
    assert "min to the last epoch" not in caplog.text
    assert re.search(r"^\d[\d,]* trainable parameters$", "\n".join(caplog.messages), re.MULTILINE)
    monkeypatch.setattr(callbacks.statistics, "median", lambda steps: 30.0)
    bench.stage1("films", name="long", trainer=trainer)
    batches = math.ceil(len(list((bench.folder / "data" / "films" / "train.jsonl").open())) / bench.data.batch_size)
    minutes = round(30 * (5 * batches - 10) / 60)
    assert f"about {minutes} min to the last epoch (30.00 s per batch), without evaluations" in caplog.text

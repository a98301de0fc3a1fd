"""A run that has not learned its task says so, and names the setting to change."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest

from fusion.config.task import TaskConfig
from fusion.config.training import LossConfig, OptimConfig, TrainerConfig
from fusion.tasks.table import kind_of
from fusion.training.losses import not_learned
from tests.bench import Bench
from tests.training.test_divergence import CHOICE, RATING, THREE, rows

TAGS = TaskConfig(name="t", kind="tagging", text="x", labels=["O", "B-a"], metrics=["token_accuracy"])
MANY = TaskConfig(name="m", kind="multi_label", text="x", labels=["a", "b"], metrics=["micro_f1"])


def test_the_loss_of_the_best_constant() -> None:
    def constant_loss(task: TaskConfig, labels: list[Any], choice_counts: Any = None) -> float:
        return kind_of(task).constant_loss(task, np.array(labels), choice_counts)

    assert constant_loss(THREE, [0, 1, 1, 1]) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert constant_loss(RATING, [1.0, 3.0]) == 1.0
    assert constant_loss(CHOICE, [0, 3], np.array([2, 4])) == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert constant_loss(MANY, [[1, 0], [0, 0]]) == pytest.approx(math.log(2) / 2)
    assert constant_loss(TAGS, [[0, 1], [0, -100], [0, 0]]) == pytest.approx(-0.2 * math.log(0.2) - 0.8 * math.log(0.8))


@pytest.mark.parametrize(
    ("task", "labels", "expected"),
    [
        (THREE, [2, 1, 2], [2, 2, 2]),
        (THREE, [1, 0], [1, 1]),
        (RATING, [0.5, 0.5], []),
        (TAGS, [[0, 1], [0]], [[0, 0], [0]]),
        (MANY, [[0], [], [0], [1]], [[0]] * 4),
    ],
)
def test_constant_predictions(task: TaskConfig, labels: list[Any], expected: list[Any]) -> None:
    assert kind_of(task).constant(labels) == expected


def test_the_signs() -> None:
    training, labels = [rows([0, 1, 1, 2])], {"validation": [0, 1, 1, 1]}
    entropy = kind_of(THREE).constant_loss(THREE, np.array([0, 1, 1, 2]), None)

    def found(loss: float | None, score: float) -> dict[str, Any]:
        figures = None if loss is None else (2.0, loss)
        return not_learned(figures, training, [THREE], {"epoch": 1, "validation/accuracy": score}, labels)

    low = {"metric": "validation/accuracy", "score": 0.75, "majority": 0.75}
    high = {"train_loss": entropy, "constant_loss": entropy}
    assert found(0.9 * entropy, 0.8) == found(None, 0.8) == {}
    assert found(0.1, 0.75) == {"task": "a", **low}
    assert found(entropy, 0.8) == {"task": "a", **high}
    assert found(entropy, 0.75) == {"task": "a", **low, **high}
    scores = {"validation/pearson": 0.1}
    assert not_learned((9.0, 0.99), [rows([1.0, 3.0])], [RATING], scores, {"validation": [1.0, 2.0]}) == {
        **{"task": "r", "train_loss": 0.99, "constant_loss": 1.0}
    }


def test_a_run_says_that_it_has_not_learned(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    still: dict[str, Any] = {"optim": OptimConfig(lr=1e-9, patience=None)}
    bench.stage1("films", **still)
    assert "the model has not learned films: validation/accuracy " in caplog.text
    assert "Increase trainer.max_epochs (now 2) or optim.lr (now 1e-09), add training examples" in caplog.text
    caplog.clear()
    short = TrainerConfig(accelerator="cpu", enable_progress_bar=False)
    optim = OptimConfig(lr=1e-9, patience=None, epochs=1, min_steps=2)
    bench.stage1("films", name="short", trainer=short, optim=optim, loss=LossConfig(label_smoothing=0.1))
    assert "Increase optim.min_steps (now 2) or optim.lr" in caplog.text and "training loss" not in caplog.text
    caplog.clear()
    longer = TrainerConfig(accelerator="cpu", enable_progress_bar=False, max_epochs=8)
    with caplog.at_level(logging.WARNING):
        bench.stage1("films", name="learned", trainer=longer, optim=OptimConfig(lr=2e-2, patience=None))
    assert "not learned" not in caplog.text

"""A training that diverged with a finite loss is marked wherever it is listed."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fusion.cli.finished import results_table
from fusion.config.task import TaskConfig
from fusion.config.training import OptimConfig, TrainerConfig
from fusion.data.encode import EncodedRows
from fusion.store.listing import describe, first_score
from fusion.store.lookup import read_manifest
from fusion.tasks.table import kind_of
from fusion.training.losses import divergence
from tests.bench import Bench

THREE = TaskConfig(name="a", text="x", labels=["p", "q", "r"], metrics=["accuracy"])
RATING = TaskConfig(name="r", kind="regression", text="x", metrics=["pearson"])
CHOICE = TaskConfig(name="c", kind="choice", text="x", choices="y", metrics=["accuracy"])


def rows(labels: Any, choice_counts: Any = None, task: int = 0) -> EncodedRows:
    content = SimpleNamespace(labels=np.array(labels), choice_counts=choice_counts, task=task, class_weights=None)
    return cast(EncodedRows, content)


def zero_score_loss(task: TaskConfig, labels: list[Any], choice_counts: Any = None) -> float:
    return kind_of(task).zero_score_loss(task, np.array(labels), choice_counts)


def test_the_loss_of_zero_scores() -> None:
    labels = [0, 1, 2, 2]
    expected = F.cross_entropy(torch.zeros(4, 3), torch.tensor(labels)).item()
    assert zero_score_loss(THREE, labels) == pytest.approx(expected)
    assert zero_score_loss(RATING, [1.0, -3.0]) == F.mse_loss(torch.zeros(2), torch.tensor([1.0, -3.0]))
    counts = np.array([2, 4])
    expected = (math.log(2) + math.log(4)) / 2
    assert zero_score_loss(CHOICE, [0, 3], counts) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        (None, False),  # nothing trained
        ((1.0, 1.5), False),  # worse than chance, as after a large learning rate
        ((1.0, 1.5e8), True),
        ((50.0, 100.0), False),  # high from the start
        ((50.0, 151.0), True),
        ((0.5, 3 * math.log(3) + 0.01), True),
        ((0.5, 3 * math.log(3) - 0.01), False),
    ],
)
def test_the_definition(figures: tuple[float, float] | None, expected: bool) -> None:
    found = divergence(figures, [rows([0, 1])], [THREE])
    assert (found is not None) == expected
    if found is not None and figures is not None:
        assert found["train_loss"] == figures[1] > found["limit"]


def test_near_zero_labels_do_not_mark_a_divergence() -> None:
    assert divergence((0.2, 0.1), [rows([0.0, 0.001])], [RATING]) is None


def test_the_largest_limit_of_multiple_tasks_applies() -> None:
    both = [rows([0, 1]), rows([10.0, 10.0], task=1)]
    assert divergence((1.0, 200.0), both, [THREE, RATING]) is None
    assert divergence((1.0, 301.0), both, [THREE, RATING]) == {"train_loss": 301.0, "limit": 300.0}


def test_a_run_that_diverges_is_marked(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    wild = OptimConfig(lr=5.0, patience=None)
    longer = TrainerConfig(accelerator="cpu", max_epochs=3, enable_progress_bar=False, gradient_clip_val=None)
    with caplog.at_level(logging.WARNING):
        result = bench.stage1("films", optim=wild, trainer=longer)
    assert result["diverged"]["train_loss"] > result["diverged"]["limit"] >= 3 * math.log(2)
    assert "training diverged: the training loss" in caplog.text
    store = bench.folder / "store"
    manifest = read_manifest("films", store)
    assert manifest.result.diverged == result["diverged"]
    assert first_score(manifest).endswith(" (diverged)")
    assert any(line.startswith("diverged      train_loss ") for line in describe("films", store))
    (titles, row) = results_table("stage1", [("films", "", result)])
    assert row[titles.index("best epoch")] == f"{result['best_epoch']} (diverged)"


def test_a_normal_run_is_not(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.add_rating()
    bench.add_quiz()
    for task in ("films", "rating", "quiz"):
        assert "diverged" not in bench.stage1(task)
    assert "diverged" not in bench.multitask("films", "rating")
    assert "diverged" not in caplog.text
    assert "diverged" not in "\n".join(describe("films", bench.folder / "store"))

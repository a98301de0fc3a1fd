"""Metrics against their definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fusion.config.task import TaskConfig
from fusion.training.predictions import main_metric, main_metrics, score

LABELS = torch.tensor([0, 0, 1, 1, 1, 0, 1, 0])
GUESSES = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1])
SCORES = torch.nn.functional.one_hot(GUESSES, 2).float()


def task(kind: str = "classification", labels: int = 2, metrics: tuple[str, ...] = ("accuracy",)) -> TaskConfig:
    names = [f"label {n}" for n in range(labels)] if kind == "classification" else None
    choices = "choices" if kind == "choice" else None
    return TaskConfig(name="t", kind=kind, text="text", choices=choices, labels=names, metrics=list(metrics))


def test_two_labels() -> None:
    both = [(int(g), int(y)) for g, y in zip(GUESSES, LABELS, strict=True)]
    tp, tn, fp, fn = (both.count(pair) for pair in [(1, 1), (0, 0), (1, 0), (0, 1)])
    f1 = 2 * tp / (2 * tp + fp + fn)
    other = 2 * tn / (2 * tn + fn + fp)
    mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    values = score(task(metrics=("accuracy", "f1", "macro_f1", "matthews")), SCORES, LABELS.numpy())
    expected = {"accuracy": (tp + tn) / 8, "f1": f1, "macro_f1": (f1 + other) / 2, "matthews": mcc}
    assert values == pytest.approx(expected, abs=1e-6)


def test_macro_f1_of_three_labels_is_the_mean_of_three() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    guesses = torch.tensor([0, 0, 1, 1, 2, 0])
    scores = torch.nn.functional.one_hot(guesses, 3).float()
    f1 = [2 * 2 / (2 * 2 + 1 + 1), 2 * 1 / (2 * 1 + 1 + 0), 2 * 1 / (2 * 1 + 0 + 1)]
    values = score(task(labels=3, metrics=("macro_f1",)), scores, labels.numpy())
    assert values["macro_f1"] == pytest.approx(sum(f1) / 3, abs=1e-6)


def test_correlations() -> None:
    truth, guess = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    values = score(task("regression", metrics=("pearson", "spearman")), guess.unsqueeze(-1), truth.numpy())
    a, b = truth - truth.mean(), guess - guess.mean()
    assert values["pearson"] == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-5)
    assert values["spearman"] == pytest.approx(0.8, abs=1e-5)  # ranks 1 2 3 4 against 1 3 2 4


@pytest.mark.parametrize(("kind", "metric"), [("regression", "pearson"), ("classification", "matthews")])
def test_an_undefined_score_is_zero_and_not_nan(kind: str, metric: str) -> None:
    columns = 1 if kind == "regression" else 2
    scores = torch.ones(4, columns) * torch.tensor([1.0] if columns == 1 else [1.0, 0.0])
    labels = torch.tensor([1.0, 2.0, 3.0, 4.0]) if columns == 1 else torch.tensor([0, 1, 0, 1])
    assert score(task(kind, metrics=(metric,)), scores, labels.numpy()) == {metric: 0.0}


def test_the_choice_with_the_highest_score_is_predicted() -> None:
    scores = torch.tensor([[0.1, 0.9, float("-inf")], [0.3, 0.2, 0.5], [2.0, 1.0, float("-inf")]])
    assert score(task("choice"), scores, torch.tensor([1, 0, 0]).numpy()) == {"accuracy": 2 / 3}


def test_the_first_metric_of_the_first_split_selects_the_epoch() -> None:
    nli = task(metrics=("f1", "accuracy"))
    assert main_metric({"validation_matched": nli, "validation_mismatched": nli}) == "validation_matched/f1"


def test_the_mean_of_the_main_metrics_of_multiple_tasks_selects_the_epoch() -> None:
    nli = replace(task(metrics=("f1", "accuracy")), name="nli")
    rating = replace(task("regression", metrics=("spearman",)), name="rating")
    splits = {"nli/matched": nli, "nli/mismatched": nli, "rating/validation": rating}
    assert main_metric(splits) == "mean"
    assert main_metrics(splits) == ["nli/matched/f1", "rating/validation/spearman"]

"""LogME against the evidence as one normal density, maximized by a general optimizer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from fusion.analysis.probe import States, logme_score
from fusion.config.task import TaskConfig

CLASSES = TaskConfig("t", text="text", labels=["a", "b", "c"], metrics=["accuracy"])
VALUES = TaskConfig("t", kind="regression", text="text", metrics=["pearson"])
CHOICES = TaskConfig("t", kind="choice", text="text", choices="choices", metrics=["accuracy"])


def features(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def slow_evidence(states: torch.Tensor, targets: torch.Tensor) -> float:
    """max over α, β of log N(y; 0, I / β + F Fᵀ / α), per row, without w and eigenvalues."""
    f, y = states.numpy(), targets.double().numpy()

    def negative(logs: np.ndarray) -> float:
        covariance = np.eye(len(f)) / np.exp(logs[1]) + f @ f.T / np.exp(logs[0])
        return -float(multivariate_normal.logpdf(y, np.zeros(len(f)), covariance)) / len(f)

    starts = [(0.0, 0.0), (2.0, 2.0), (-2.0, 2.0)]
    return -min(minimize(negative, start, method="Nelder-Mead", tol=1e-10).fun for start in starts)


@pytest.mark.parametrize("width", [4, 30])  # fewer and more than the rows
def test_a_regression_has_the_evidence_of_the_density(width: int) -> None:
    states = features(20, width)
    values = (states[:, 0] - 0.5 * states[:, 1] + 0.3 * torch.sin(torch.arange(20.0))).float()
    found = logme_score(States(states, values, None), VALUES)
    assert found == pytest.approx(slow_evidence(states, values), abs=1e-4)


def test_classes_are_the_mean_over_their_columns() -> None:
    states = features(24, 5)
    labels = (states[:, 2] + 0.2 * states[:, 0]).argsort().argsort() * 3 // 24
    expected = [slow_evidence(states, labels == label) for label in range(3)]
    assert logme_score(States(states, labels, None), CLASSES) == pytest.approx(sum(expected) / 3, abs=1e-4)


def test_choices_are_labelled_as_right_or_wrong() -> None:
    counts = torch.tensor([2, 3, 2, 4] * 3)
    states = features(int(counts.sum()), 4)
    labels = torch.tensor([1, 2, 0, 3] * 3)
    right = torch.zeros(len(states))
    first = 0
    for count, label in zip(counts.tolist(), labels.tolist(), strict=True):
        right[first + label] = 1
        first += count
    found = logme_score(States(states, labels, counts), CHOICES)
    assert found == pytest.approx(slow_evidence(states, right), abs=1e-4)


def test_informative_states_score_higher() -> None:
    states = features(60, 6)
    labels = states[:, 1].argsort().argsort() * 3 // 60
    random = labels[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
    assert logme_score(States(states, labels, None), CLASSES) > logme_score(States(states, random, None), CLASSES) + 0.1


def test_missing_labels_and_constant_states() -> None:
    states, labels = features(10, 3), torch.tensor([0, 1] * 5)
    expected = [slow_evidence(states, labels == label) for label in range(2)]
    assert logme_score(States(states, labels, None), CLASSES) == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert math.isfinite(logme_score(States(torch.zeros_like(states), labels, None), CLASSES))
    assert math.isnan(logme_score(States(states, torch.ones_like(labels), None), CLASSES))

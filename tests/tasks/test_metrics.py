"""The metrics against scikit-learn and scipy, with their corners: constants, one class, few rows, ties, extremes."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as sklearn

from fusion.tasks.metrics import metric_of

QUICK = settings(max_examples=150, deadline=None, derandomize=True)

# What float32 can hold, since predictions come as float32; small and few values, so that ties and constants occur.
VALUES = st.one_of(
    st.sampled_from([0.0, 0.1, 0.3, 1.0, -2.5]), st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
)


def floats(*numbers: float) -> NDArray[np.float32]:
    return np.array(numbers, np.float32)


def one(name: str, labels: Any, predicted: Any) -> float:
    (value,) = metric_of(name, np.asarray(labels)[None], np.asarray(predicted)[None])
    return float(value)


@st.composite
def classes(draw: st.DrawFn) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    count, rows = draw(st.integers(2, 5)), draw(st.integers(1, 30))
    ids = st.integers(0, draw(st.integers(0, count - 1)))  # often fewer classes than there are
    labels = draw(st.lists(ids, min_size=rows, max_size=rows))
    predicted = draw(st.lists(ids, min_size=rows, max_size=rows))
    return count, np.array(labels), np.array(predicted)


@st.composite
def values(draw: st.DrawFn) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rows = draw(st.integers(1, 20))
    numbers = st.lists(VALUES, min_size=rows, max_size=rows)
    return np.array(draw(numbers), np.float32), np.array(draw(numbers), np.float32)


@QUICK
@given(classes())
@example((2, np.array([0, 1, 1, 0, 1]), np.zeros(5, int)))  # one prediction for all
@example((2, np.ones(5, int), np.array([0, 1, 1, 0, 1])))  # one class in the truth
@example((2, np.array([1]), np.array([1])))
@example((2, np.array([0, 0]), np.array([0, 0])))
def test_classification_metrics_equal_scikit_learn(case: tuple[int, NDArray[np.int64], NDArray[np.int64]]) -> None:
    count, labels, predicted = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not defined, which it takes as 0
        expected = {
            "accuracy": sklearn.accuracy_score(labels, predicted),
            "macro_f1": sklearn.f1_score(labels, predicted, average="macro", zero_division=0),
            "matthews": sklearn.matthews_corrcoef(labels, predicted),
        }
        if count == 2:
            expected["f1"] = sklearn.f1_score(labels, predicted, pos_label=1, zero_division=0)
    for name, value in expected.items():
        assert one(name, labels, predicted) == pytest.approx(value, abs=1e-12), name


@QUICK
@given(values())
@example((floats(1, 2, 3), floats(0.1, 0.1, 0.1)))
@example((floats(1, 2), floats(5, 7)))
@example((floats(1, 2), floats(7, 5)))
@example((floats(3e38, -3e38, 0), floats(1e-38, 2e-38, 3e-38)))
@example((floats(1, 2, 3), floats(16777216, 16777216, 16777218)))  # neighbours in float32
def test_correlations_equal_scipy(case: tuple[NDArray[np.float32], NDArray[np.float32]]) -> None:
    labels, predicted = (column.astype(np.float64) for column in case)
    functions = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}
    for name, function in functions.items():
        value = one(name, *case)
        if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predicted) == 0:
            assert value == 0.0, name
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy warns of nearly constant values
            expected = float(function(labels, predicted).statistic)
        assert value == pytest.approx(expected, abs=1e-9), name


def test_a_constant_prediction_has_no_correlation() -> None:
    """CoLA's shares: a library that perturbs the binary case gave a constant prediction 0.84."""
    labels = np.array([1] * 721 + [0] * 322)
    assert one("matthews", labels, np.ones_like(labels)) == 0.0
    assert one("matthews", np.ones_like(labels), np.ones_like(labels)) == 0.0


@pytest.mark.parametrize("constant", [0.1, 1 / 3, 1e-38, 1e30])
def test_a_constant_stays_one_where_its_mean_is_rounded(constant: float) -> None:
    labels = np.arange(7.0)
    for name in ("pearson", "spearman"):
        assert one(name, labels, np.full(7, constant)) == 0.0
        assert one(name, labels, np.full(7, np.float32(constant))) == 0.0


@pytest.mark.parametrize("extreme", [math.nan, math.inf, -math.inf])
def test_predictions_that_are_not_finite_correlate_with_nothing(extreme: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one("pearson", np.arange(3.0), np.array([1.0, extreme, 2.0])) == 0.0


def test_scores_are_in_double_precision() -> None:
    assert one("accuracy", np.arange(10), np.array([*range(9), 0])) == 0.9
    assert one("f1", [1, 1, 0], [1, 0, 1]) == 0.5


def test_each_resample_independently() -> None:
    """Also next to one with more classes, or with other constants."""
    draw = np.random.RandomState(0)
    labels, predicted = draw.randint(4, size=(6, 20)), draw.randint(4, size=(6, 20))
    labels[1], predicted[2], labels[3] = 0, 1, labels[3] % 2
    for name in ("accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"):
        together = metric_of(name, labels, predicted)
        assert together.shape == (6,)
        assert together == pytest.approx([one(name, *pair) for pair in zip(labels, predicted, strict=True)])


def test_matthews_of_many_rows() -> None:
    """The products of the counts are beyond what float64 holds exactly."""
    labels = np.repeat([0, 1], [200_000, 100_000])
    predicted = labels.copy()
    predicted[:50_000] = 1
    assert one("matthews", labels, predicted) == pytest.approx(sklearn.matthews_corrcoef(labels, predicted))


def test_an_unknown_metric() -> None:
    with pytest.raises(KeyError):
        metric_of("bleu", np.zeros((1, 3), int), np.zeros((1, 3), int))

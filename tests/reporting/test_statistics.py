"""The report's statistics against scipy and against cases with a known answer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from fusion.reporting.statistics import RESAMPLES, Difference, Predictions, Sample, compare, constant_scores, holm

DRAW = np.random.RandomState(0)


def predictions(accuracy: float, rows: int = 400, seed: int = 0) -> Predictions:
    labels = np.random.RandomState(1).randint(2, size=rows)
    wrong = np.random.RandomState(seed + 10).permutation(rows) >= round(accuracy * rows)
    return Predictions("rows", labels, np.where(wrong, 1 - labels, labels))


def sample(accuracy: float, seed: int, rows: int = 400) -> Sample:
    return Sample(seed, accuracy, predictions(accuracy, rows, seed))


def test_one_seed_uses_the_paired_bootstrap_over_examples() -> None:
    """Against scipy's own bootstrap of the rows' differences."""
    one, other = sample(0.9, 0), sample(0.8, 1)
    other = dataclasses.replace(other, seed=0)
    assert one.predictions is not None and other.predictions is not None
    found = compare([one], [other], "accuracy")
    each = (one.predictions.predicted == one.predictions.labels).astype(float) - (
        other.predictions.predicted == other.predictions.labels
    )
    expected = stats.bootstrap((each,), np.mean, method="percentile", n_resamples=9999).confidence_interval
    assert found.mean == pytest.approx(0.1)
    assert found.low == pytest.approx(expected.low, abs=0.006)
    assert found.high == pytest.approx(expected.high, abs=0.006)
    assert found.unit == "examples" and found.p is not None and found.p < 0.01
    assert (found.wins, found.ties, found.losses) == (1, 0, 0)


def test_variation_over_seeds_widens_the_interval() -> None:
    """Resampling rows alone would miss it."""
    base = [sample(0.7, seed) for seed in range(4)]
    steady = compare([sample(0.8, seed) for seed in range(4)], base, "accuracy")
    shaky = compare([sample(0.8 + (0.1 if seed % 2 else -0.1), seed) for seed in range(4)], base, "accuracy")
    assert steady.unit == shaky.unit == "examples and seeds"
    assert steady.mean == pytest.approx(shaky.mean)
    assert None not in (steady.low, steady.high, shaky.low, shaky.high)
    assert shaky.high - shaky.low > 1.5 * (steady.high - steady.low)  # type: ignore[operator]
    assert (shaky.wins, shaky.ties, shaky.losses) == (2, 2, 0)


def test_false_positive_rate() -> None:
    """Of 200 pairs of equally good methods, about one in twenty differs significantly."""
    draw, found = np.random.RandomState(5), 0
    for _ in range(200):
        labels = np.zeros(150, int)
        one, other = ((draw.rand(150) < 0.2).astype(int) for _ in range(2))
        pair = [Sample(0, float((p == 0).mean()), Predictions("rows", labels, p)) for p in (one, other)]
        p = compare(pair[:1], pair[1:], "accuracy").p
        assert p is not None
        found += p <= 0.05
    assert 2 <= found <= 20


def test_equal_predictions_have_no_difference() -> None:
    found = compare([sample(0.8, 3)], [sample(0.8, 3)], "accuracy")
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert (found.wins, found.ties, found.losses) == (0, 1, 0)


def test_difference_is_antisymmetric() -> None:
    ones, others = [sample(0.85, s) for s in range(3)], [sample(0.8, s + 5) for s in range(3)]
    others = [dataclasses.replace(other, seed=seed) for seed, other in enumerate(others)]
    there, back = compare(ones, others, "macro_f1"), compare(others, ones, "macro_f1")
    assert there.mean == -back.mean and there.p == pytest.approx(back.p, abs=2 / RESAMPLES)
    assert there.low == pytest.approx(-back.high) and there.wins == back.losses  # type: ignore[operator]


def test_without_predictions_seeds_are_resampled() -> None:
    """p is of the exact permutation test over all swaps."""
    ones = [Sample(seed, 0.8 + 0.01 * seed) for seed in range(5)]
    others = [Sample(seed, 0.7) for seed in range(5)]
    found = compare(ones, others, "accuracy")
    assert found.unit == "seeds" and found.mean == pytest.approx(0.12)
    assert found.p == pytest.approx(2 / 2**5)
    assert found.low is not None and found.high is not None and 0.1 < found.low < 0.12 < found.high < 0.14


def test_pairs_without_spread() -> None:
    found = compare([Sample(s, 0.75) for s in range(3)], [Sample(s, 0.5) for s in range(3)], "accuracy")
    assert (found.low, found.high) == (0.25, 0.25) and found.p == pytest.approx(0.25)


def test_one_run_each_without_predictions() -> None:
    found = compare([Sample(1, 0.8)], [Sample(1, 0.7)], "accuracy")
    assert found == Difference(found.mean, None, None, None, "", 1, 0, 0)
    assert found.mean == pytest.approx(0.1)


def test_runs_without_common_seeds_are_not_paired() -> None:
    found = compare([sample(0.9, 7)], [sample(0.8, 1), sample(0.8, 2)], "accuracy")
    assert found.unit == "examples and seeds" and (found.wins, found.ties, found.losses) == (0, 0, 0)
    assert found.mean == pytest.approx(0.1)


def test_by_seed_false_pairs_nothing() -> None:
    """One run against three, one of which happens to have the same seed."""
    found = compare([sample(0.7, 1)], [sample(0.8, s) for s in (1, 2, 3)], "accuracy", by_seed=False)
    assert found.mean == pytest.approx(-0.1) and (found.wins, found.ties, found.losses) == (0, 0, 0)
    one, others = [Sample(1, 0.7)], [Sample(1, 0.6), Sample(2, 0.9)]
    assert compare(one, others, "accuracy", by_seed=False).mean == pytest.approx(-0.05)
    assert compare(one, others, "accuracy").mean == pytest.approx(0.1)


def test_unmatched_examples_are_not_resampled() -> None:
    one, other = sample(0.9, 0), sample(0.8, 0)
    assert other.predictions is not None
    moved = dataclasses.replace(other, predictions=dataclasses.replace(other.predictions, fingerprint="others"))
    assert compare([one], [moved], "accuracy").p is None


def test_intervals_are_deterministic() -> None:
    pair = [sample(0.9, 0), sample(0.85, 1)], [sample(0.8, 0), sample(0.8, 1)]
    assert compare(*pair, "accuracy") == compare(*pair, "accuracy")


def test_holm_against_its_definition() -> None:
    """The k-th smallest of m is rejected at level a exactly if each p(j), j <= k, is at most a / (m - j + 1)."""
    for _ in range(50):
        values = DRAW.rand(DRAW.randint(1, 8)) ** 3
        adjusted = holm(list(values))
        order = np.argsort(values)
        for level in (0.01, 0.05, 0.2):
            rejected = set()
            for rank, place in enumerate(order):
                if values[place] > level / (len(values) - rank):
                    break
                rejected.add(int(place))
            assert {n for n, p in enumerate(adjusted) if p <= level} == rejected
    assert holm([]) == [] and holm([0.03]) == [0.03]


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_majority_class_against_counting(classes: int, seed: int) -> None:
    labels = np.random.RandomState(seed).choice(classes, 37, p=np.random.RandomState(9).dirichlet([1] * classes))
    occurring = sorted(set(labels.tolist()))
    majority = max(occurring, key=lambda label: (sum(one == label for one in labels), -label))

    def f1(label: int) -> float:
        """From precision and recall of predicting the majority class for every row."""
        hits = sum(one == label == majority for one in labels)
        if not hits:
            return 0.0
        precision, recall = hits / len(labels), hits / sum(one == label for one in labels)
        return 2 * precision * recall / (precision + recall)

    expected = {
        "accuracy": sum(one == majority for one in labels) / len(labels),
        "macro_f1": sum(map(f1, occurring)) / len(occurring),
        "matthews": 0.0,
    }
    expected |= {"f1": f1(1)} if classes == 2 else {}
    name, scores = constant_scores(labels, [*expected, "pearson", "unknown"])
    assert name == "majority class" and scores == pytest.approx(expected)


def test_constant_values_have_no_correlation() -> None:
    assert constant_scores(np.array([0.5, 2.0, 4.5]), ["pearson", "spearman"]) == ("mean", {})
    assert constant_scores(np.array([], int), ["accuracy"]) == ("", {})

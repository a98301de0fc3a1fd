"""Verdicts on a benchmark's rounds."""

from __future__ import annotations

import math

import pytest

from pipelines.benchmark.report import NOT_REACHED, REACHED, TOO_FEW, TOO_NOISY, Figure, Target, interval, ratio, spread


def test_a_spread_is_the_distance_of_the_quartiles_in_medians() -> None:
    # In order 0.1 0.2 0.3 0.4 0.45 0.9: quartiles 0.225 and 0.4375, median 0.35.
    assert spread([0.3, 0.1, 0.9, 0.4, 0.45, 0.2]) == pytest.approx((0.4375 - 0.225) / 0.35)
    assert spread([2.0, 4.0, 3.0]) == pytest.approx(1 / 3)


def test_a_slow_round_drops_out_of_the_ratio() -> None:
    figure = ratio("step", [4.0, 40.0, 4.4], [2.0, 20.0, 2.2])
    assert figure.values == pytest.approx((2.0, 2.0, 2.0))
    assert figure.verdict() == ""  # for information only


@pytest.mark.parametrize(
    ("values", "target", "expected"),
    [
        ((4.6, 4.7, 4.5), Target(4.5, at_least=True), REACHED),
        ((4.4, 4.3, 4.4), Target(4.5, at_least=True), NOT_REACHED),
        ((1.2, 1.2, 1.25), Target(1.25), REACHED),
        ((1.3, 1.3, 1.26), Target(1.25), NOT_REACHED),
        ((1.2, 1.2, 1.3), Target(1.25), TOO_NOISY),
        ((9.0, 4.6, 6.0), Target(4.5, at_least=True), REACHED),  # noisy, and yet all rounds agree
        ((9.0, 4.4, 6.0), Target(4.5, at_least=True), TOO_NOISY),
        ((4.4, *range(5, 13)), Target(4.5, at_least=True), REACHED),  # one of nine rounds is outside the interval
        ((4.6,), Target(4.5, at_least=True), TOO_FEW),
    ],
)
def test_verdicts(values: tuple[float, ...], target: Target, expected: str) -> None:
    assert Figure("step", values, target).verdict() == expected


def test_a_limit_of_the_spread() -> None:
    figure = Figure("step", (9.0, 4.6, 6.0), Target(4.5, at_least=True))
    assert figure.verdict(0.1) == TOO_NOISY and figure.verdict(1.0) == REACHED


@pytest.mark.parametrize("count", [1, 2, 5, 6, 8, 9, 12, 20])
def test_the_interval_contains_the_median_in_95_percent(count: int) -> None:
    """It is the narrowest symmetric one that does, or the range if there are too few values."""
    low, high = map(int, interval(list(range(1, count + 1))))
    assert low == count + 1 - high
    outside = [2 * sum(math.comb(count, k) for k in range(end)) / 2**count for end in (low, low + 1)]
    assert (outside[0] <= 0.05 < outside[1]) if count >= 6 else low == 1


def test_a_count_needs_no_rounds() -> None:
    assert ratio("bytes", [3], [2], Target(1.6), exact=True).verdict() == REACHED


def test_how_figures_are_shown() -> None:
    percent = Figure("loop", (1.021,), Target(1.03), unit="%")
    assert percent.row() == ["loop", "+2.1 %", "", "", "", "<= +3.0 %", TOO_FEW]
    seconds = Figure("start", (9.0, 9.0), Target(10.0), unit="s")
    assert seconds.row() == ["start", "9.00 s", "9.00 s", "9.00 s", "0 %", "<= 10.00 s", REACHED]
    content = Figure("step", (4.6, 5.0, 4.5), Target(4.5, at_least=True)).as_json()
    assert (content["median"], content["low"], content["high"]) == (4.6, 4.5, 5.0)
    assert content["interval"] == (4.5, 5.0)
    assert (content["to_reach"], content["verdict"]) == (">= 4.5", REACHED)

"""Verdicts on a benchmark's rounds."""

from __future__ import annotations

import pytest

from pipelines.benchmark.report import NOT_REACHED, REACHED, TOO_FEW, TOO_NOISY, Figure, Target, ratio, spread


def test_a_spread_is_the_distance_of_the_quartiles_in_medians() -> None:
    # In order 0.1 0.2 0.3 0.4 0.45 0.9: quartiles 0.225 and 0.4375, median 0.35.
    assert spread([0.3, 0.1, 0.9, 0.4, 0.45, 0.2]) == pytest.approx((0.4375 - 0.225) / 0.35)
    assert spread([2.0, 4.0, 3.0]) == pytest.approx(1 / 3)


def test_a_slow_round_drops_out_of_the_ratio() -> None:
    figure = ratio("step", [4.0, 40.0, 4.4], [2.0, 20.0, 2.2])
    assert figure.values == pytest.approx((2.0, 2.0, 2.0))
    assert figure.verdict(0.1) == ""  # for information only


@pytest.mark.parametrize(
    ("values", "target", "expected"),
    [
        ((4.6, 4.7, 4.5), Target(4.5, at_least=True), REACHED),
        ((4.4, 4.3, 4.4), Target(4.5, at_least=True), NOT_REACHED),
        ((1.2, 1.2, 1.3), Target(1.25), REACHED),
        ((1.3, 1.3, 1.2), Target(1.25), NOT_REACHED),
        ((9.0, 4.6, 6.0), Target(4.5, at_least=True), TOO_NOISY),
        ((4.6,), Target(4.5, at_least=True), TOO_FEW),
    ],
)
def test_verdicts(values: tuple[float, ...], target: Target, expected: str) -> None:
    assert Figure("step", values, target).verdict(0.1) == expected


def test_a_small_margin_needs_a_small_spread() -> None:
    rounds = (1.00, 1.02, 1.08)  # they spread by 4 %
    assert Figure("loop", rounds, Target(1.03)).verdict(0.1) == TOO_NOISY
    assert Figure("loop", rounds, Target(1.25)).verdict(0.1) == REACHED


def test_a_count_needs_no_rounds() -> None:
    assert ratio("bytes", [3], [2], Target(1.6), exact=True).verdict(0.1) == REACHED


def test_how_figures_are_shown() -> None:
    percent = Figure("loop", (1.021,), Target(1.03), unit="%")
    assert percent.row(0.1) == ["loop", "+2.1 %", "", "", "", "<= +3.0 %", TOO_FEW]
    seconds = Figure("start", (9.0, 9.0), Target(10.0), unit="s")
    assert seconds.row(0.1) == ["start", "9.00 s", "9.00 s", "9.00 s", "0 %", "<= 10.00 s", REACHED]
    content = Figure("step", (4.0, 5.0, 4.5), Target(4.5, at_least=True)).as_json(0.2)
    assert (content["median"], content["low"], content["high"]) == (4.5, 4.0, 5.0)
    assert (content["to_reach"], content["verdict"]) == (">= 4.5", REACHED)

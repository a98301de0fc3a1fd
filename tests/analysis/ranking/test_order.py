"""Ranks, their mean and the methods' agreement against counting by hand."""

from __future__ import annotations

import math

import pytest

from fusion.analysis.ranking.order import agreement, best_first, mean_ranks, ranks, table_rows

ONE = [0.9, 0.1, 0.5, 0.5, None]
OTHER = [2.0, 3.0, 1.0, -1.0, 5.0]


def slow_ranks(scores: list[float | None]) -> list[float | None]:
    """1 + how many are higher + half of how many others are equal."""
    known = [s for s in scores if s is not None]
    return [
        None if s is None else 1 + sum(o > s for o in known) + (sum(o == s for o in known) - 1) / 2
        for s in scores
    ]


def slow_kendall(one: list[float], other: list[float]) -> float:
    """τ-b: concordant less discordant pairs, over the geometric mean of the pairs that each does not tie."""
    pairs = [(a, b) for a in range(len(one)) for b in range(a)]
    signs = [
        ((one[a] > one[b]) - (one[a] < one[b]), (other[a] > other[b]) - (other[a] < other[b]))
        for a, b in pairs
    ]
    untied = [sum(sign[side] != 0 for sign in signs) for side in (0, 1)]
    return sum(x * y for x, y in signs) / math.sqrt(untied[0] * untied[1])


def pearson(one: list[float], other: list[float]) -> float:
    a, b = ([value - sum(v) / len(v) for value in v] for v in (one, other))
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
        sum(x * x for x in a) * sum(y * y for y in b)
    )


def test_ranks_share_places_and_pass_over_what_has_no_score() -> None:
    assert ranks(ONE) == slow_ranks(ONE) == [1.0, 4.0, 2.5, 2.5, None]
    assert ranks(OTHER) == slow_ranks(list(OTHER))
    assert ranks([None, None]) == [None, None]


def test_the_mean_is_over_the_methods_that_have_a_score() -> None:
    found = mean_ranks({"one": ONE, "other": OTHER})
    assert found == [(1 + 3) / 2, (4 + 2) / 2, (2.5 + 4) / 2, (2.5 + 5) / 2, 1.0]
    assert mean_ranks({"one": [None, 1.0]}) == [None, 1.0]
    assert best_first(["e", "d", "c", "b", "a"], found) == [4, 0, 1, 2, 3]
    assert best_first(["z", "y", "x"], [None, 1.0, 1.0]) == [2, 1, 0]


def test_agreement_is_kendalls_and_spearmans() -> None:
    found = agreement({"one": ONE, "other": OTHER, "flat": [1.0] * 5})
    assert set(found) == {"one/other", "one/flat", "other/flat"}
    a, b = [s for s in ONE if s is not None], OTHER[:4]
    assert found["one/other"]["kendall"] == pytest.approx(slow_kendall(a, b))
    own = [[float(r or 0) for r in slow_ranks(list(scores))] for scores in (a, b)]
    assert found["one/other"]["spearman"] == pytest.approx(pearson(*own))
    assert found["one/flat"] == found["other/flat"] == {"kendall": None, "spearman": None}
    assert agreement({"one": [1.0, None], "other": [None, 1.0]})["one/other"]["kendall"] is None
    assert agreement({"one": ONE}) == {}


def test_the_table_shows_what_there_is() -> None:
    sources = [
        {"name": "snli", "mean_rank": 1.5, "scores": {"probe": 0.75}, "ranks": {"probe": 1.5}},
        {"name": "rte", "mean_rank": None, "scores": {"probe": None}, "ranks": {"probe": None}},
    ]
    assert table_rows({"methods": ["probe"], "sources": sources}) == [
        ["", "source", "mean rank", "probe"],
        ["1", "snli", "1.50", "0.7500 (1.5)"],
        ["2", "rte", "-", "-"],
    ]

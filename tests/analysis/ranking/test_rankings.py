"""Ranks, their mean and the agreement of methods against slow versions."""

from __future__ import annotations

import math

import pytest

from fusion.analysis.ranking.rankings import agreement, ranked

ONE = [0.9, 0.1, 0.5, 0.5, None]
OTHER = [2.0, 3.0, 1.0, -1.0, 5.0]


def slow_ranks(scores: list[float | None]) -> list[float | None]:
    """1 + how many are higher + half of how many others are equal."""
    known = [s for s in scores if s is not None]
    return [None if s is None else 1 + sum(o > s for o in known) + (sum(o == s for o in known) - 1) / 2 for s in scores]


def slow_kendall(one: list[float], other: list[float]) -> float:
    """τ-b: concordant less discordant pairs, over the geometric mean of the pairs that each does not tie."""
    pairs = [(a, b) for a in range(len(one)) for b in range(a)]
    signs = [((one[a] > one[b]) - (one[a] < one[b]), (other[a] > other[b]) - (other[a] < other[b])) for a, b in pairs]
    untied = [sum(sign[side] != 0 for sign in signs) for side in (0, 1)]
    return sum(x * y for x, y in signs) / math.sqrt(untied[0] * untied[1])


def pearson(one: list[float], other: list[float]) -> float:
    a, b = ([value - sum(v) / len(v) for value in v] for v in (one, other))
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_ranks_and_their_mean() -> None:
    """Equal scores share a rank, and a missing score has none."""
    found = ranked(["e", "d", "c", "b", "a"], {"one": ONE, "other": OTHER})
    assert [row["name"] for row in found] == ["a", "e", "d", "c", "b"]
    by_name = {row["name"]: row for row in found}
    for method, scores in (("one", ONE), ("other", OTHER)):
        assert [by_name[name]["ranks"][method] for name in "edcba"] == slow_ranks(list(scores))
        assert [by_name[name]["scores"][method] for name in "edcba"] == list(scores)
    assert [by_name[name]["mean_rank"] for name in "edcba"] == [2.0, 3.0, 3.25, 3.75, 1.0]


def test_equal_mean_ranks_are_sorted_by_name_and_missing_ones_are_last() -> None:
    found = ranked(["z", "y", "x"], {"one": [math.nan, 1.0, 1.0], "other": [math.inf, None, None]})
    assert [(row["name"], row["mean_rank"]) for row in found] == [("x", 1.5), ("y", 1.5), ("z", None)]
    assert found[2]["scores"] == found[2]["ranks"] == {"one": None, "other": None}


def test_agreement() -> None:
    found = agreement({"one": ONE, "other": OTHER, "flat": [1.0] * 5})
    assert set(found) == {"one/other", "one/flat", "other/flat"}
    a, b = [s for s in ONE if s is not None], OTHER[:4]
    assert found["one/other"]["kendall"] == pytest.approx(slow_kendall(a, b))
    own = [[float(r or 0) for r in slow_ranks(list(scores))] for scores in (a, b)]
    assert found["one/other"]["spearman"] == pytest.approx(pearson(*own))
    assert found["one/flat"] == found["other/flat"] == {"kendall": None, "spearman": None}
    assert agreement({"one": [1.0, None], "other": [None, 1.0]})["one/other"]["kendall"] is None
    assert agreement({"one": ONE}) == {}

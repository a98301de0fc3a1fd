"""From scores to ranks, their mean, and how far the methods agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

Scores = Sequence[float | None]


def ranks(scores: Scores) -> list[float | None]:
    """1 for the highest score; equal scores share the mean of their places; None stays None."""
    from scipy.stats import rankdata

    known = [n for n, score in enumerate(scores) if score is not None]
    found: list[float | None] = [None] * len(scores)
    if known:
        for n, rank in zip(known, rankdata([-float(scores[n]) for n in known]), strict=True):  # type: ignore[arg-type]
            found[n] = float(rank)
    return found


def mean_ranks(by_method: Mapping[str, Scores]) -> list[float | None]:
    """Of each source, over the methods that have a score for it; None where none has."""
    every = [ranks(scores) for scores in by_method.values()]
    found: list[float | None] = []
    for own in zip(*every, strict=True):
        known = [rank for rank in own if rank is not None]
        found.append(math.fsum(known) / len(known) if known else None)
    return found


def agreement(by_method: Mapping[str, Scores]) -> dict[str, dict[str, float | None]]:
    """Of each pair of methods Kendall's τ-b and Spearman's ρ over the sources that both have a score for.

    None where there are fewer than two such sources, or a method gives all of them the same score.
    """
    return {
        f"{one}/{other}": correlation(by_method[one], by_method[other])
        for one, other in combinations(by_method, 2)
    }


def correlation(one: Scores, other: Scores) -> dict[str, float | None]:
    """Kendall's τ-b and Spearman's ρ, as `agreement` has them."""
    from scipy.stats import kendalltau, spearmanr

    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    if any(len(set(column)) < 2 for column in zip(*pairs, strict=True)) or len(pairs) < 2:
        return {"kendall": None, "spearman": None}
    first, second = zip(*pairs, strict=True)
    return {
        "kendall": float(kendalltau(first, second).statistic),
        "spearman": float(spearmanr(first, second).statistic),
    }


def best_first(names: Sequence[str], mean: Sequence[float | None]) -> list[int]:
    """Positions by mean rank, those without one last; ties by name."""
    return sorted(
        range(len(names)), key=lambda n: (math.inf if mean[n] is None else float(mean[n] or 0), names[n])
    )


def table_rows(ranking: Mapping[str, Any]) -> list[list[str]]:
    """The ranking as cells: place, source, mean rank, and of each method the score with the rank."""
    methods = ranking["methods"]
    rows = [["", "source", "mean rank", *methods]]
    for place, source in enumerate(ranking["sources"], 1):
        cells = []
        for method in methods:
            score, rank = source["scores"][method], source["ranks"][method]
            cells.append("-" if score is None else f"{score:.4f} ({rank:g})")
        mean = "-" if source["mean_rank"] is None else f"{source['mean_rank']:.2f}"
        rows.append([str(place), source["name"], mean, *cells])
    return rows

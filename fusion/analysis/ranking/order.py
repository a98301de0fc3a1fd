"""Ranks from scores, their mean, and the agreement between scorers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

Scores = Sequence[float | None]


def ranked(names: Sequence[str], scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """By source, best first: `name`, `mean_rank`, and `ranks` and `scores` by method.

    Rank 1 is the highest score, equal scores share their mean rank, and sources of equal mean rank are sorted by name.
    A score that is None or not finite has no rank; a source without any rank comes last.
    """
    import pandas as pd

    table = pd.DataFrame(scores, index=list(names), dtype=float).replace([math.inf, -math.inf], math.nan)
    ranks = table.rank(ascending=False)
    order = pd.DataFrame({"mean": ranks.mean(axis=1), "name": list(names)}).sort_values(["mean", "name"])
    return [
        {
            "name": name,
            "mean_rank": _plain(mean),
            "ranks": {method: _plain(rank) for method, rank in ranks.loc[name].items()},
            "scores": {method: _plain(score) for method, score in table.loc[name].items()},
        }
        for name, mean in order["mean"].items()
    ]


def _plain(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def agreement(scores: Mapping[str, Scores]) -> dict[str, dict[str, float | None]]:
    """`correlation` of each pair of methods, by `one/other`."""
    return {f"{one}/{other}": correlation(scores[one], scores[other]) for one, other in combinations(scores, 2)}


def correlation(one: Scores, other: Scores) -> dict[str, float | None]:
    """Kendall's τ-b and Spearman's ρ over the sources with both scores.

    None if there are fewer than two, or if all scores of one side are equal.
    """
    import pandas as pd

    known = pd.DataFrame({"one": one, "other": other}, dtype=float).dropna()
    if (known.nunique() < 2).any():
        return {"kendall": None, "spearman": None}
    return {method: float(known["one"].corr(known["other"], method=method)) for method in ("kendall", "spearman")}

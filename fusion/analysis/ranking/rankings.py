"""Rankings of sources: ranks and agreement of scores, and stored rankings, `STORE/.rankings/TASK-HASH.json`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from fusion.errors import UserError
from fusion.files import write_json
from fusion.store.layout import read_regular

RANKINGS = ".rankings"
FORMAT_VERSION = 1
Scores = Sequence[float | None]


def ranked(names: Sequence[str], scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """Return a dict per source, best first: `name`, `mean_rank`, and `ranks` and `scores` by method.

    Rank 1 is the highest score; equal scores share their mean rank. Sources with equal mean ranks are sorted by name.
    Scores that are `None` or not finite have no rank; sources without any rank come last.
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
    """Return the `correlation` of each pair of methods, with keys `one/other`."""
    return {f"{one}/{other}": correlation(scores[one], scores[other]) for one, other in combinations(scores, 2)}


def correlation(one: Scores, other: Scores) -> dict[str, float | None]:
    """Return Kendall's τ-b and Spearman's ρ over the sources that have both scores.

    Both are `None` for fewer than two sources, or if all scores of a method are equal.
    """
    import pandas as pd

    known = pd.DataFrame({"one": one, "other": other}, dtype=float).dropna()
    if (known.nunique() < 2).any():
        return {"kendall": None, "spearman": None}
    return {method: float(known["one"].corr(known["other"], method=method)) for method in ("kendall", "spearman")}


class RankedSource(BaseModel):
    name: str
    reference: str  # configured name or path
    hash: str
    mean_rank: float | None
    ranks: dict[str, float | None]  # by method


class StoredRanking(BaseModel):
    """Keys of a stored ranking that stage 2 uses."""

    format_version: Literal[1]
    task: dict[str, Any]
    backbone: dict[str, str]
    methods: list[str]
    made: str  # ISO 8601 in UTC
    sources: Annotated[list[RankedSource], Field(min_length=1)]  # best first
    path: Path


def write_ranking(store: Path, ranking: dict[str, Any], question: dict[str, Any]) -> Path:
    """Save a ranking and return its path. `question`: all that it depends on except the seed; sets the file name."""
    text = json.dumps(question, sort_keys=True, default=str)
    name = str(ranking["task"]["name"]).replace("/", "-")
    path = store / RANKINGS / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format_version": FORMAT_VERSION, "question": question, **ranking})
    return path


def rankings_of(store: Path, task: dict[str, Any], backbone: str) -> tuple[list[StoredRanking], list[str]]:
    """Return the rankings for a target and backbone, newest first, and the error messages of damaged files."""
    found, damaged = [], []
    task = json.loads(json.dumps(task, default=str))
    for path in sorted((store / RANKINGS).glob("*.json")):
        try:
            ranking = read_ranking(path)
        except UserError as error:
            damaged.append(str(error))
            continue
        if ranking.task == task and ranking.backbone.get("name") == backbone:
            found.append(ranking)
    return sorted(found, key=lambda ranking: ranking.made, reverse=True), damaged


def read_ranking(path: Path) -> StoredRanking:
    """Read a stored ranking. Raises UserError if it is damaged or has a different format version."""
    try:
        return StoredRanking(**json.loads(read_regular(path)) | {"path": path})
    except (ValueError, TypeError, RecursionError) as error:  # pydantic's is a ValueError
        problem = ": ".join(line.strip() for line in str(error).splitlines()[:3])
        raise UserError(f"{path} is not a valid ranking ({problem}); delete it and rerun fusion.rank") from None

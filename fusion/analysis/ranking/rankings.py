"""Rankings of sources: ranks and agreement from scores, and stored rankings, `STORE/.rankings/TASK-HASH.json`.

The hash is that of what the ranking depends on: target, rows, backbone, sources and methods. The same ranking overwrites
its file. All is readable without torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from fusion.errors import UserError
from fusion.files import write_json
from fusion.store.layout import read_regular
from fusion.store.lookup import entries

RANKINGS = ".rankings"
FORMAT_VERSION = 1
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


class Backbone(BaseModel):
    name: str


class RankedSource(BaseModel):
    """`reference` is the name or path that was configured, `ranks` are by method."""

    name: str
    reference: str
    hash: str
    mean_rank: float | None
    ranks: dict[str, float | None]


class StoredRanking(BaseModel):
    """The keys of a ranking that stage 2 reads; `sources` are best first, `made` is ISO 8601 in UTC."""

    format_version: Literal[1]
    task: dict[str, Any]
    backbone: Backbone
    methods: list[str]
    made: str
    sources: Annotated[list[RankedSource], Field(min_length=1)]
    path: Path


def write_ranking(store: Path, ranking: dict[str, Any], question: dict[str, Any]) -> Path:
    """Store a ranking and return its file.

    Args:
        question: what the ranking depends on, except for the seed.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(question, sort_keys=True, default=str)
    name = str(ranking["task"]["name"]).replace("/", "-")
    path = store / RANKINGS / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format_version": FORMAT_VERSION, "question": question, **ranking})
    return path


def rankings_of(store: Path, task: dict[str, Any], backbone: str) -> tuple[list[StoredRanking], list[str]]:
    """The rankings for a target, newest first, and the errors of damaged files.

    Args:
        task: all keys; a task whose file has changed since is another target.
        backbone: name or path.
    """
    found, damaged = [], []
    task = json.loads(json.dumps(task, default=str))
    for path in entries(store / RANKINGS):
        if path.suffix != ".json":
            continue
        try:
            ranking = read_ranking(path)
        except UserError as error:
            damaged.append(str(error))
            continue
        if ranking.task == task and ranking.backbone.name == backbone:
            found.append(ranking)
    return sorted(found, key=lambda ranking: ranking.made, reverse=True), damaged


def read_ranking(path: Path) -> StoredRanking:
    """
    Raises:
        UserError: the file is damaged or of another version.
    """
    try:
        return StoredRanking(**json.loads(read_regular(path)) | {"path": path})
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (ValueError, TypeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise UserError(f"{path}: is no ranking ({problem}); remove it, and rank again")

"""What the store says of a row: scores, parameters, bytes, seconds a step, and which rate was best."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from pipelines.compare.plan import Member, Training
from pipelines.compare.rows import Row


@dataclass
class RowResult:
    """A line of the table.

    Attributes:
        rate: the one of the grid with the best mean over the seeds; None: not from a grid.
        artifacts: with that rate, one a seed.
        scores: by metric, one a seed.
        grid: by rate and metric, the means over the seeds.
        seconds_per_step: None where nothing trained (or the run did not say).
        inference: of the first artifact, in the bare backbone's time.
        command: what trained it.
    """

    id: str
    title: str
    group: str
    rate: float | None
    artifacts: list[str]
    scores: dict[str, list[float]]
    grid: dict[str, dict[str, float]]
    trainable: int
    stored_bytes: int
    sources: list[str]
    seconds_per_step: float | None
    best_epochs: list[int]
    command: str
    inference: dict[str, float] | None = None

    @property
    def main_metric(self) -> str:
        """The first of the task: it chose the epoch and the rate."""
        return next(iter(self.scores))

    @property
    def score(self) -> float:
        return statistics.fmean(self.scores[self.main_metric])


def read_manifest_json(store: Path, name: str) -> dict[str, Any] | None:
    """The manifest of a stored artifact; None: it is not there."""
    path = store / name / "manifest.json"
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def target_scores(manifest: dict[str, Any], target: str) -> dict[str, float]:
    """The metrics of the target's first validation split; a multi-task run calls its splits TASK/SPLIT.

    Raises:
        UserError: it was not scored on the target.
    """
    metrics: dict[str, dict[str, float | None]] = manifest["metrics"]
    splits = [split for split in metrics if split.startswith(f"{target}/")]
    if not splits:
        splits = [split for split in metrics if "/" not in split]
    if not splits:
        raise UserError(f"{manifest['name']} has no score on {target}, only on {', '.join(metrics)}")
    return {name: math.nan if value is None else value for name, value in metrics[splits[0]].items()}


def row_result(
    row: Row, training: Training, store: Path, target: str, without: Collection[str] = ()
) -> RowResult | None:
    """The row with its best rate; None where no rate has an artifact of every seed.

    Of rates with the same score the first stands.

    Args:
        without: artifacts that do not count, though something of that name may be stored.

    Raises:
        UserError: what is stored was not scored on the target.
    """
    by_rate: dict[float | None, list[Member]] = {}
    for member in training.members:
        by_rate.setdefault(member.rate, []).append(member)
    complete: dict[float | None, list[dict[str, Any]]] = {}
    for rate, members in by_rate.items():
        manifests = [
            None if member.name in without else read_manifest_json(store, member.name) for member in members
        ]
        if all(manifest is not None for manifest in manifests):
            complete[rate] = [manifest for manifest in manifests if manifest is not None]
    if not complete:
        return None
    scores = {rate: _by_metric([target_scores(m, target) for m in made]) for rate, made in complete.items()}
    means = {
        rate: {metric: statistics.fmean(values) for metric, values in by_metric.items()}
        for rate, by_metric in scores.items()
    }
    first = {rate: next(iter(by_metric.values())) for rate, by_metric in means.items()}
    best = max(first, key=lambda rate: -math.inf if math.isnan(first[rate]) else first[rate])
    made = complete[best]
    results = [manifest["result"] for manifest in made]
    steps = [result["speed"].get("seconds_per_step") for result in results] if row.trains else []
    timed = [seconds for seconds in steps if seconds is not None]
    return RowResult(
        id=row.id,
        title=row.title,
        group=row.group,
        rate=best,
        artifacts=[member.name for member in by_rate[best]],
        scores=scores[best],
        grid={} if best is None else {str(rate): means[rate] for rate in means},
        trainable=int(results[0]["parameters"]["trainable"]) if row.trains else 0,
        stored_bytes=sum(file["bytes"] for file in made[0]["files"].values()),
        sources=[source["name"] for source in made[0]["sources"]],
        seconds_per_step=statistics.median(timed) if timed else None,
        best_epochs=[int(result["best_epoch"]) for result in results] if row.trains else [],
        command=str(training),
    )


def _by_metric(scores: list[dict[str, float]]) -> dict[str, list[float]]:
    return {metric: [one[metric] for one in scores] for metric in scores[0]}

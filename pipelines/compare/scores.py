"""The result of a row, read from the store: the best learning rate, scores, parameters, bytes and seconds."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from fusion.errors import UserError
from fusion.store.lookup import names, read_manifest
from fusion.store.manifest import Manifest
from pipelines.compare.plan import Training
from pipelines.compare.rows import Row


@dataclass
class RowResult:
    """A row of the table.

    Attributes:
        rate: learning rate with the best mean over the seeds; None: no grid.
        artifacts: with that rate, one per seed.
        scores: by metric, one per seed.
        grid: means over the seeds by rate and metric.
        seconds_per_step, seconds: of training, the median over the seeds; None if nothing was trained.
        inference: of the first artifact, relative to the bare backbone.
        command: the command that trained it.
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
    seconds: float | None = None

    @property
    def main_metric(self) -> str:
        """The first metric of the task, by which the epoch and the learning rate are selected."""
        return next(iter(self.scores))

    @property
    def score(self) -> float:
        return fmean(self.scores[self.main_metric])


def target_scores(manifest: Manifest, target: str) -> dict[str, float]:
    """The metrics of the target's first validation split; a multi-task run names its splits TASK/SPLIT.

    Raises:
        UserError: it was not scored on the target.
    """
    own = [split for split in manifest.metrics if split.startswith(f"{target}/")]
    splits = own or [split for split in manifest.metrics if "/" not in split]
    if not splits:
        raise UserError(f"{manifest.name} has no score on {target}, only on {', '.join(manifest.metrics)}")
    metrics = manifest.metrics[splits[0]]
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def row_result(
    row: Row, training: Training, store: Path, target: str, without: Collection[str] = ()
) -> RowResult | None:
    """The result with the best learning rate, the first of equal ones; None: no rate has an artifact of every seed.

    Args:
        without: artifacts that do not count even if they are stored.

    Raises:
        UserError: an artifact was not scored on the target.
    """
    usable = set(names(store)) - set(without)
    complete = {
        rate: [read_manifest(name, store) for name in artifacts]
        for rate, artifacts in training.artifacts.items()
        if usable.issuperset(artifacts)
    }
    if not complete:
        return None
    scores: dict[float | None, dict[str, list[float]]] = {}
    for rate, manifests in complete.items():
        each = [target_scores(manifest, target) for manifest in manifests]
        scores[rate] = {metric: [of_seed[metric] for of_seed in each] for metric in each[0]}
    means = {rate: {metric: fmean(v) for metric, v in of.items()} for rate, of in scores.items()}
    first = {rate: next(iter(of.values())) for rate, of in means.items()}
    best = max(first, key=lambda rate: -math.inf if math.isnan(first[rate]) else first[rate])
    manifest = complete[best][0]
    results = [one.result for one in complete[best]] if row.trains else []

    def median_speed(key: str) -> float | None:
        values = [value for result in results if (value := result.speed.get(key)) is not None]
        return median(values) if values else None

    return RowResult(
        id=row.id,
        title=row.title,
        group=row.group,
        rate=best,
        artifacts=training.artifacts[best],
        scores=scores[best],
        grid={} if best is None else {str(rate): mean for rate, mean in means.items()},
        trainable=results[0].parameters["trainable"] if results else 0,
        stored_bytes=sum(file.bytes for file in manifest.files.values()),
        sources=[source.name for source in manifest.sources],
        seconds_per_step=median_speed("seconds_per_step"),
        best_epochs=[result.best_epoch for result in results if result.best_epoch is not None],
        command=str(training),
        seconds=median_speed("seconds"),
    )

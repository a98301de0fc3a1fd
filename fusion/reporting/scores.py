"""The scores of all runs: one for each run, task and split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion.reporting.reading import RunFolder
from fusion.reporting.statistics import Predictions
from fusion.reporting.trained import Trained, artifact_path, read_artifact
from fusion.runs.run import OUTCOMES


@dataclass(frozen=True)
class Score:
    """One run's metrics on a task and split.

    trained: None for an artifact that no run here made. anywhere: trained on another task, so the score belongs to
    every setting of the target.
    """

    task: str
    split: str
    method: str
    metrics: Mapping[str, float]
    predictions: Predictions | None
    run: RunFolder
    trained: Trained | None
    anywhere: bool = False

    @property
    def variant(self) -> Mapping[str, Any]:
        return {} if self.trained is None else self.trained.variant

    @property
    def seed(self) -> int:
        return 0 if self.trained is None else self.trained.seed

    @property
    def setting(self) -> tuple[str, int | None]:
        """Of the target: the backbone and the limit of training rows."""
        if self.trained is None:
            return "", None
        return self.trained.backbone, None if self.anywhere else self.trained.limit

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.trained.sources if self.trained is not None else (str(self.run.result.get("name")),)


def all_scores(runs: Sequence[RunFolder], trained: Sequence[Trained]) -> list[Score]:
    """The validation scores of the trainings in their best epoch, and the scores of the evaluations."""
    scores = []
    for one in trained:
        for task, split, metrics, predictions in _metrics_of(one.run, one.tasks[0]):
            scores.append(Score(task, split, one.method, metrics, predictions, one.run, one))
    return [*scores, *_evaluations(runs, trained)]


def _evaluations(runs: Iterable[RunFolder], trained: Sequence[Trained]) -> list[Score]:
    """The last evaluation of each artifact, task and split."""
    by_path = {one.artifact: one for one in trained}
    last: dict[tuple[Any, ...], Score] = {}
    for run in runs:
        if run.command != "evaluate" or "artifact" not in run.result:
            continue
        path, drop = artifact_path(run), run.result.get("drop")
        maker = by_path.get(path)
        if maker is not None and maker.hash is not None and run.result.get("hash") not in (None, maker.hash):
            continue  # the evaluated artifact was replaced since
        for task, split, metrics, predictions in _metrics_of(run, str(run.result.get("task")).split("+")[0]):
            own = maker is not None and task in maker.tasks
            method = maker.method if own and maker is not None else f"{_tasks_of(run, path, maker)} alone"
            method += f", {drop} layers dropped" if drop else ""
            last[path, task, split, drop] = Score(
                task, split, method, metrics, predictions, run, maker, not own
            )
    return list(last.values())


def _tasks_of(run: RunFolder, path: str, maker: Trained | None) -> str:
    """An artifact's name in tables: its tasks, so that seeds of one source are one method."""
    if maker is not None:
        return "+".join(maker.tasks)
    manifest = read_artifact(path)
    return str(run.result.get("name")) if manifest is None else "+".join(manifest.task_names)


def _metrics_of(
    run: RunFolder, default_task: str
) -> Iterable[tuple[str, str, dict[str, float], Predictions | None]]:
    """Task, split, finite metrics and predictions of each score in a result."""
    outcomes = run.json(OUTCOMES) or {}
    for key, metrics in (run.result.get("metrics") or {}).items():
        task, _, split = key.rpartition("/")
        numbers = {
            str(name): float(value)
            for name, value in (metrics.items() if isinstance(metrics, dict) else ())
            if isinstance(value, (int, float)) and np.isfinite(value)
        }
        if numbers:
            yield task or default_task, split, numbers, Predictions.of(outcomes.get(key))

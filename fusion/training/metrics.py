"""The metrics of a task file, computed over all rows at once, and the one that picks the best epoch.

Shapes: B rows, K outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from fusion.config.task import TaskConfig
from fusion.tasks.kind import Decision
from fusion.tasks.table import kind_of

MEAN = "mean"  # of the main metrics of all tasks


def predicted(
    task: TaskConfig, scores: Tensor, labels: NDArray[Any] | None, decision: Decision | None = None
) -> list[Any]:
    """The prediction for each row; arguments as of `score`."""
    kind = kind_of(task)
    outputs = kind.outputs(scores)
    if decision is None:
        assert labels is not None
        decision = kind.decision(task, outputs, kind.plain_labels(labels))
    return kind.predict(outputs, decision)


def score(
    task: TaskConfig, scores: Tensor, labels: NDArray[Any] | None, decision: Decision | None = None
) -> dict[str, float]:
    """All metrics of the task.

    Args:
        scores: (B, K), of the head.
        labels: (B,) or (B, ...).
        decision: as an artifact stores it, see `Kind.decision`; None: chosen on these rows.
    """
    assert labels is not None
    predictions = predicted(task, scores, labels, decision)
    return score_predictions(task, predictions, kind_of(task).plain_labels(labels))


def score_predictions(task: TaskConfig, predictions: Sequence[Any], labels: Sequence[Any]) -> dict[str, float]:
    """All metrics of the task over all rows, in double precision."""
    return kind_of(task).metrics(task, labels, predictions)


def main_metric(splits: Mapping[str, TaskConfig]) -> str:
    """The metric that selects the best epoch: the first one on the first split; for multiple tasks, the mean.

    Args:
        splits: the task of each validation split.
    """
    names = main_metrics(splits)
    return names[0] if len(names) == 1 else MEAN


def main_metrics(splits: Mapping[str, TaskConfig]) -> list[str]:
    """Each task's first metric on its first validation split, in the order of the tasks."""
    first: dict[str | None, str] = {}
    for split, task in splits.items():
        first.setdefault(task.name, f"{split}/{task.metrics[0]}")
    return list(first.values())

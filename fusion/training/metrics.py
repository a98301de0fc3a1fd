"""The metrics of a task file, computed over all rows at once, and the one that picks the best epoch.

Shapes: B rows, K outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from fusion.config import TaskConfig
from fusion.metrics import metric_of

MEAN = "mean"  # of several tasks, their main metrics' mean: every task counts the same


def predicted(scores: Tensor, kind: str) -> Tensor:
    """scores: (B, K) of the head -> (B,): the value of a regression, else the index of the best."""
    return scores.float().squeeze(-1) if kind == "regression" else scores.argmax(-1)


def score(task: TaskConfig, scores: Tensor, labels: NDArray[Any] | None) -> dict[str, float]:
    """All metrics of the task for scores (rows, K) and labels (rows,)."""
    assert labels is not None
    return score_predictions(task, predicted(scores, task.kind).cpu().numpy(), labels)


def score_predictions(task: TaskConfig, predictions: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """All metrics of the task, in double precision.

    Args:
        predictions, labels: (rows,), class ids or values.
    """
    return {name: float(metric_of(name, labels[None], predictions[None])[0]) for name in task.metrics}


def main_metric(splits: Mapping[str, TaskConfig]) -> str:
    """What picks the best epoch: the task's first metric on its first validation split; of several tasks, the mean.

    Args:
        splits: by name, with the task whose rows each one holds.
    """
    names = main_metrics(splits)
    return names[0] if len(names) == 1 else MEAN


def main_metrics(splits: Mapping[str, TaskConfig]) -> list[str]:
    """Each task's first metric on its first validation split, in the order of the tasks."""
    first: dict[str | None, str] = {}
    for split, task in splits.items():
        first.setdefault(task.name, f"{split}/{task.metrics[0]}")
    return list(first.values())

"""The metrics of a task file, computed over all rows at once (and over all processes).

Shapes: B rows, K outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from fusion.config import TaskConfig

MEAN = "mean"  # of several tasks, their main metrics' mean: every task counts the same


class ChoiceAccuracy(Metric):
    """The share of rows whose best choice is the right one; rows may have any number of choices."""

    right: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        self.right += (predictions == labels).sum()
        self.rows += labels.numel()

    def compute(self) -> Tensor:
        return self.right / self.rows


class TaskMetrics(nn.Module):
    """All metrics of one split of a task.

    accuracy; f1 (of the second of two labels, as GLUE has it); macro_f1 (mean over the labels
    that occur or are predicted); matthews; pearson; spearman.
    """

    def __init__(self, task: TaskConfig) -> None:
        super().__init__()
        self.kind = task.kind
        classes = len(task.labels or [])
        # A ModuleDict, so that the metrics follow the module from device to device.
        self._metrics = nn.ModuleDict({name: _metric(name, task.kind, classes) for name in task.metrics})

    @property
    def metrics(self) -> dict[str, Metric]:
        return cast(dict[str, Metric], dict(self._metrics))

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """scores: (B, K) of the head, labels: (B,)."""
        predictions = predicted(scores, self.kind)
        for metric in self.metrics.values():
            metric.update(predictions, labels)

    def compute(self) -> dict[str, float]:
        """Each metric as a number; one that is not defined (a constant prediction) counts as 0."""
        values = {name: float(metric.compute()) for name, metric in self.metrics.items()}
        return {name: 0.0 if value != value else value for name, value in values.items()}

    def reset(self) -> None:
        for metric in self.metrics.values():
            metric.reset()


def predicted(scores: Tensor, kind: str) -> Tensor:
    """scores: (B, K) of the head -> (B,): the value of a regression, else the index of the best."""
    return scores.float().squeeze(-1) if kind == "regression" else scores.argmax(-1)


def _metric(name: str, kind: str, classes: int) -> Metric:
    if name == "accuracy":
        return ChoiceAccuracy() if kind == "choice" else MulticlassAccuracy(classes, average="micro")
    if name == "f1":
        return BinaryF1Score()
    if name == "macro_f1":
        return MulticlassF1Score(classes, average="macro")
    if name == "matthews":
        return MulticlassMatthewsCorrCoef(classes)
    return PearsonCorrCoef() if name == "pearson" else SpearmanCorrCoef()


def score(task: TaskConfig, scores: Tensor, labels: NDArray[Any] | None) -> dict[str, float]:
    """All metrics of the task for scores (rows, K) and labels (rows,)."""
    assert labels is not None
    metrics = TaskMetrics(task)
    metrics.update(scores, torch.from_numpy(labels))
    return metrics.compute()


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

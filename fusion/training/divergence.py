"""Detect trainings that diverged with a finite loss.

The mean training loss of the last epoch (the task's own, without penalties) is then more than `FACTOR` times the larger
of two: the loss of scores that are all zero, and the loss of the first batch, before any update. Zero scores cost
log(labels) in cross entropy, and the mean square of the labels in a regression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusion.config.task import TaskConfig
from fusion.data.encode import EncodedRows
from fusion.tasks.table import kind_of

FACTOR = 3.0


def zero_score_loss(rows: EncodedRows, task: TaskConfig) -> float:
    """The mean loss of scores that are all zero, without class weights and label smoothing."""
    assert rows.labels is not None
    return kind_of(task).zero_score_loss(task, rows.labels, rows.choice_counts)


def divergence(
    figures: tuple[float, float] | None, training: Sequence[EncodedRows], tasks: Sequence[TaskConfig]
) -> dict[str, float] | None:
    """`{"train_loss", "limit"}` of a training that diverged, as result.json has it; else None.

    Args:
        figures: of `EpochLoss`.
        training: one split per task.
    """
    if figures is None:
        return None
    first, last = figures
    limit = FACTOR * max(first, *(zero_score_loss(rows, tasks[rows.task]) for rows in training))
    return {"train_loss": last, "limit": limit} if last > limit else None


def shown(diverged: Mapping[str, Any]) -> str:
    return f"training loss {diverged['train_loss']:.4g} in the last epoch, above {diverged['limit']:.4g}"

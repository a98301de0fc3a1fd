"""The weight of each label in the training loss, from the settings and the training examples."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fusion.config.task import TaskConfig
from fusion.config.training import LossConfig
from fusion.data.encode import EncodedRows
from fusion.errors import UserError
from fusion.tasks.table import kind_of

log = logging.getLogger(__name__)


def set_class_weights(loss: LossConfig, tasks: Sequence[TaskConfig], training: Sequence[EncodedRows]) -> None:
    """Set `class_weights` and `loss_weights` of each task's training examples.

    `balanced` is n / (k * count), as scikit-learn's `compute_class_weight`: n examples, k labels, and the number of
    examples that have the label.

    Raises:
        UserError: `balanced`, and a label has no training example.
    """
    for task, rows in zip(tasks, training, strict=True):
        kind = kind_of(task)
        rows.class_weights = _of_task(loss, task, rows)
        assert rows.labels is not None
        rows.loss_weights = kind.loss_weights(rows.labels, rows.class_weights)
        if rows.class_weights is not None:
            labels = zip(task.labels or [], rows.class_weights, strict=True)
            shown = ", ".join(f"{name} {weight:.4g}" for name, weight in labels)
            log.info("%s: class weights %s", task.name, shown)
        elif loss.class_weights is not None:
            log.info("%s: no class weights, which a task of kind %s does not have", task.name, task.kind)
        if loss.label_smoothing > 0 and not kind.smooths_labels:
            log.info("%s: no label smoothing, which %s does not have", task.name, kind.noun)


def _of_task(loss: LossConfig, task: TaskConfig, rows: EncodedRows) -> NDArray[np.float64] | None:
    if loss.class_weights is None or not kind_of(task).has_classes:
        return None
    if loss.class_weights != "balanced":
        return np.array(loss.class_weights, np.float64)
    names = task.labels or []
    assert rows.labels is not None
    counts = np.bincount(rows.labels, minlength=len(names))
    if missing := [name for name, count in zip(names, counts, strict=True) if count == 0]:
        ones = ",".join(["1.0"] * len(names)) if len(names) <= 20 else "..."
        raise UserError(
            f"loss.class_weights=balanced: no training example of {task.name} has the label {', '.join(missing[:20])}, "
            "so that its weight would be infinite\n"
            f"Set a weight for each label, in their order: 'loss.class_weights=[{ones}]'"
        )
    return len(rows) / (len(names) * counts.astype(np.float64))

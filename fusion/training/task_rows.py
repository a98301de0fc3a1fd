"""Tokenized examples of a run's tasks, with the weights of their labels in the training loss."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fusion.backbones.load import Backbone
from fusion.config.data import DataConfig
from fusion.config.task import TaskConfig
from fusion.config.training import LossConfig
from fusion.data.encode import EncodedRows, encode
from fusion.data.rows import Rows, load_splits
from fusion.data.splits import evaluation_splits
from fusion.errors import UserError
from fusion.tasks.table import kind_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskRows:
    training: list[EncodedRows]  # of each task
    validation: dict[str, EncodedRows]  # by split name; with multiple tasks, it starts with the task: `cb/validation`
    labels: dict[str, str] = field(default_factory=dict)  # label format by task name, see `load_splits`
    examples: dict[str, Rows] = field(default_factory=dict)  # of `validation`


def load_task_rows(tasks: Sequence[TaskConfig], data: DataConfig, loss: LossConfig, backbone: Backbone) -> TaskRows:
    """Read, check and tokenize the training and validation examples. Raises UserError if the data is invalid."""
    assert data.max_length is not None
    loaded = TaskRows([], {})
    for number, task in enumerate(tasks):
        splits = ["train", *evaluation_splits(task, "validation", data)]
        loaded_rows, label_format = load_splits(task, data, splits)
        if label_format is not None:
            loaded.labels[str(task.name)] = label_format
            log.info("%s: labels read as %s", task.name, label_format)
        for split, rows in loaded_rows.items():
            encoded = encode(rows, backbone.tokenizer, data.max_length, data.cache_dir, backbone.family.causal)
            encoded.task = number
            if split == "train":
                loaded.training.append(encoded)
            else:
                loaded.validation[split_name(tasks, number, split)] = encoded
                loaded.examples[split_name(tasks, number, split)] = rows
            ignored = f" ({rows.ignored} more have no label and are not used)" if rows.ignored else ""
            log.info("%s %s: %d examples%s", task.name, split, len(rows), ignored)
    set_class_weights(loss, tasks, loaded.training)
    return loaded


def split_name(tasks: Sequence[TaskConfig], number: int, split: str) -> str:
    """Return the name of a split in metrics, prefixed with the task name in multi-task training."""
    return split if len(tasks) == 1 else f"{tasks[number].name}/{split}"


def set_class_weights(loss: LossConfig, tasks: Sequence[TaskConfig], training: Sequence[EncodedRows]) -> None:
    """Set `class_weights` and `loss_weights` of each task's training examples.

    `balanced` is n / (k * count) as in scikit-learn's `compute_class_weight`, for n examples, k labels and count
    examples of the label. Raises UserError if a label then has no training example.
    """
    for task, rows in zip(tasks, training, strict=True):
        kind = kind_of(task)
        rows.class_weights = _class_weights(loss, task, rows)
        assert rows.labels is not None
        rows.loss_weights = kind.loss_weights(rows.labels, rows.class_weights)
        if rows.class_weights is not None:
            labels = zip(task.labels or [], rows.class_weights, strict=True)
            shown = ", ".join(f"{name} {weight:.4g}" for name, weight in labels)
            log.info("%s: class weights %s", task.name, shown)
        elif loss.class_weights is not None:
            log.info("%s: no class weights, since kind=%s does not support them", task.name, task.kind)
        if loss.label_smoothing > 0 and not kind.smooths_labels:
            log.info("%s: no label smoothing, since a task of kind %s does not support it", task.name, kind.name)


def _class_weights(loss: LossConfig, task: TaskConfig, rows: EncodedRows) -> NDArray[np.float64] | None:
    if loss.class_weights is None or not kind_of(task).has_classes:
        return None
    if loss.class_weights != "balanced":
        return np.array(loss.class_weights, np.float64)
    names = task.labels or []
    assert rows.labels is not None
    counts = np.bincount(rows.labels, minlength=len(names))
    if missing := [name for name, count in zip(names, counts, strict=True) if count == 0]:
        weights = ",".join(["1.0"] * len(names)) if len(names) <= 20 else "..."
        raise UserError(
            f"loss.class_weights=balanced: no training example of {task.name} has the label {', '.join(missing[:20])}\n"
            f"Set one weight per label, in label order: 'loss.class_weights=[{weights}]'"
        )
    return len(rows) / (len(names) * counts.astype(np.float64))

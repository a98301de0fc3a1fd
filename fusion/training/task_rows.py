"""The tokenised rows of a run's tasks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from fusion.backbones.load import Backbone
from fusion.config.data import DataConfig
from fusion.config.task import TaskConfig
from fusion.config.training import LossConfig
from fusion.data.encode import EncodedRows, encode
from fusion.data.rows import load_splits
from fusion.data.splits import evaluation_splits
from fusion.training.class_weights import set_class_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskRows:
    """
    Attributes:
        training: one split per task.
        validation: by split; with multiple tasks, the names start with the task's: `cb/validation`.
        labels: how the labels of each task are read, by the task's name, see `load_splits`.
    """

    training: list[EncodedRows]
    validation: dict[str, EncodedRows]
    labels: dict[str, str] = field(default_factory=dict)


def load_task_rows(tasks: Sequence[TaskConfig], data: DataConfig, loss: LossConfig, backbone: Backbone) -> TaskRows:
    """Read, check and tokenise the training and validation rows of all tasks.

    Raises:
        UserError: the data are wrong; names the file and row.
    """
    assert data.max_length is not None
    loaded = TaskRows([], {})
    for number, task in enumerate(tasks):
        splits = ["train", *evaluation_splits(task, "validation", data)]
        loaded_rows, way = load_splits(task, data, splits)
        if way is not None:
            loaded.labels[str(task.name)] = way
            log.info("%s: labels read as %s", task.name, way)
        for split, rows in loaded_rows.items():
            encoded = encode(rows, backbone.tokenizer, data.max_length, data.cache_dir)
            encoded.task = number
            if split == "train":
                loaded.training.append(encoded)
            else:
                loaded.validation[split_name(tasks, number, split)] = encoded
            ignored = f", {rows.ignored} without a label dropped" if rows.ignored else ""
            log.info("%s %s: %d rows%s", task.name, split, len(rows), ignored)
    set_class_weights(loss, tasks, loaded.training)
    return loaded


def split_name(tasks: Sequence[TaskConfig], number: int, split: str) -> str:
    """The name of a split in metrics, with the task's name in multi-task training."""
    return split if len(tasks) == 1 else f"{tasks[number].name}/{split}"

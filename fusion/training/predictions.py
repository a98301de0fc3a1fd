"""Predictions and metrics of a split: per row in outcomes.json, so that runs can be compared, and over all rows at once.

Shapes: B rows, K outputs.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from fusion.config.task import TaskConfig
from fusion.data.encode import EncodedRows
from fusion.files import write_json
from fusion.runs.run import OUTCOMES
from fusion.tasks.table import kind_of
from fusion.training.processes import gathered

log = logging.getLogger(__name__)

MEAN = "mean"  # of the main metrics of all tasks


@dataclass(frozen=True)
class RowPredictions:
    """The predictions for the evaluated rows of a split, in their order, on the CPU.

    Attributes:
        rows: the rows' indices in the split; not all of them with `trainer.limit_val_batches`.
        predictions, labels: a JSON value for each row, see `fusion.tasks.kind`.
    """

    rows: list[int]
    predictions: list[Any]
    labels: list[Any]

    @classmethod
    def gathered(cls, parts: Sequence[RowPredictions]) -> RowPredictions:
        """The rows of all parts and all processes, in the order of the split. All processes have to call it."""
        own = [(part.rows, part.predictions, part.labels) for part in parts]
        columns = zip(*chain.from_iterable(gathered(own)), strict=True)
        rows, predictions, labels = (list(chain.from_iterable(column)) for column in columns)
        order = sorted(range(len(rows)), key=rows.__getitem__)
        return cls(*([column[place] for place in order] for column in (rows, predictions, labels)))

    def as_stored(self, split: EncodedRows) -> dict[str, Any]:
        """The split's part of outcomes.json: a fingerprint of the evaluated rows, their labels and predictions.

        If not all rows were evaluated, `rows` has their indices, and the fingerprint is of that selection.
        """
        content = {"fingerprint": split.fingerprint, "labels": self.labels, "predicted": self.predictions}
        if len(self.rows) == len(split):
            return content
        selection = hashlib.sha256(f"{split.fingerprint} {self.rows}".encode()).hexdigest()
        return content | {"rows": self.rows, "fingerprint": selection}


def write_predictions(directory: Path, splits: Mapping[str, dict[str, Any]]) -> None:
    """Write outcomes.json; if that fails, log a warning."""
    try:
        write_json(directory / OUTCOMES, splits)
    except OSError as error:
        log.warning("%s: cannot be written (%s)", directory / OUTCOMES, error.strerror or error)


def score(task: TaskConfig, scores: Tensor, labels: NDArray[Any] | None) -> dict[str, float]:
    """All metrics of the task, with the decision that these rows give, see `Kind.decision`.

    Args:
        scores: (B, K), of the head.
        labels: (B,) or (B, ...).
    """
    assert labels is not None
    kind = kind_of(task)
    outputs, plain = kind.outputs(scores), kind.plain_labels(labels)
    return kind.metrics(task, plain, kind.predict(outputs, kind.decision(task, outputs, plain)))


def main_metric(splits: Mapping[str, TaskConfig]) -> str:
    """The metric that selects the best epoch: the first one on the first split; for multiple tasks, the mean."""
    names = main_metrics(splits)
    return names[0] if len(names) == 1 else MEAN


def main_metrics(splits: Mapping[str, TaskConfig]) -> list[str]:
    """Each task's first metric on its first validation split, given the task of each split."""
    first: dict[str | None, str] = {}
    for split, task in splits.items():
        first.setdefault(task.name, f"{split}/{task.metrics[0]}")
    return list(first.values())

"""Predictions per example, stored in outcomes.json so that runs can be compared, and the metrics of a split."""

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

MEAN = "mean"  # name of the mean of all tasks' main metrics


@dataclass(frozen=True)
class RowPredictions:
    """Predictions for the evaluated examples of a split, in the order of the split."""

    rows: list[int]  # indices of the examples in the split; a subset with `trainer.limit_val_batches`
    predictions: list[Any]  # a JSON value per example, see `fusion.tasks.kind`
    labels: list[Any]

    @classmethod
    def gathered(cls, parts: Sequence[RowPredictions]) -> RowPredictions:
        """Gather the examples of all parts and processes. Collective: must be called on all ranks."""
        own = [(part.rows, part.predictions, part.labels) for part in parts]
        columns = zip(*chain.from_iterable(gathered(own)), strict=True)
        rows, predictions, labels = (list(chain.from_iterable(column)) for column in columns)
        order = sorted(range(len(rows)), key=rows.__getitem__)
        return cls(*([column[index] for index in order] for column in (rows, predictions, labels)))

    def as_stored(self, split: EncodedRows) -> dict[str, Any]:
        """Return the split's entry in outcomes.json: fingerprint, labels and predictions of the evaluated examples.

        If only a subset was evaluated, the entry also contains its indices as `rows`, and the fingerprint covers them.
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
    """Return all metrics of logits (B, K) and labels (B, ...), with the decision parameters selected on them."""
    assert labels is not None
    kind = kind_of(task)
    outputs, plain = kind.outputs(scores), kind.plain_labels(labels)
    return kind.metrics(task, plain, kind.predict(outputs, kind.decision(task, outputs, plain)))


def main_metric(splits: Mapping[str, TaskConfig]) -> str:
    """Return the name of the metric that selects the best epoch: the main metric, or the mean for multiple tasks."""
    names = main_metrics(splits)
    return names[0] if len(names) == 1 else MEAN


def main_metrics(splits: Mapping[str, TaskConfig]) -> list[str]:
    """Return each task's first metric on its first validation split, given the task of each split."""
    first: dict[str | None, str] = {}
    for split, task in splits.items():
        first.setdefault(task.name, f"{split}/{task.metrics[0]}")
    return list(first.values())

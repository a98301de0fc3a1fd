"""Predictions per example, stored in outcomes.json so that runs can be compared, and the metrics of a split."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from fusion.config.task import TaskConfig
from fusion.data.encode import EncodedRows
from fusion.data.rows import Rows
from fusion.files import write_json
from fusion.runs.run import OUTCOMES
from fusion.tasks.table import kind_of
from fusion.training.processes import gathered

log = logging.getLogger(__name__)

ERRORS = 20  # most confident errors in outcomes.json
TEXT = 300  # characters of each text

MEAN = "mean"  # name of the mean of all tasks' main metrics


@dataclass(frozen=True)
class RowPredictions:
    """Predictions for the evaluated examples of a split, in the order of the split."""

    rows: list[int]  # indices of the examples in the split; a subset with `trainer.limit_val_batches`
    predictions: list[Any]  # a JSON value per example, see `fusion.tasks.kind`
    labels: list[Any]
    confidence: list[float] = field(default_factory=list)  # probability of each prediction; empty if unknown

    @classmethod
    def gathered(cls, parts: Sequence[RowPredictions]) -> RowPredictions:
        """Gather the examples of all parts and processes. Collective: must be called on all ranks."""
        own = [(part.rows, part.predictions, part.labels, part.confidence) for part in parts]
        columns = [
            list(chain.from_iterable(column)) for column in zip(*chain.from_iterable(gathered(own)), strict=True)
        ]
        order = sorted(range(len(columns[0])), key=columns[0].__getitem__)
        return cls(*([column[index] for index in order] if column else [] for column in columns))

    def as_stored(self, split: EncodedRows, task: TaskConfig, examples: Rows | None = None) -> dict[str, Any]:
        """Return the split's entry in outcomes.json: fingerprint, labels and predictions of the evaluated examples.

        With confidences, it also contains these and, given the `examples` of the split, the most confident errors. If only
        a subset was evaluated, it contains its indices as `rows`, and the fingerprint covers them.
        """
        content = {"fingerprint": split.fingerprint, "labels": self.labels, "predicted": self.predictions}
        if self.confidence:
            content |= {"confidence": self.confidence}
            content |= {} if examples is None else {"errors": self.confident_errors(task, examples)}
        if len(self.rows) == len(split):
            return content
        selection = hashlib.sha256(f"{split.fingerprint} {self.rows}".encode()).hexdigest()
        return content | {"rows": self.rows, "fingerprint": selection}

    def confident_errors(self, task: TaskConfig, examples: Rows) -> list[dict[str, Any]]:
        """Return the wrong predictions with the highest confidence: `row`, `text`, `label`, `predicted`, `confidence`."""
        each = zip(self.rows, self.labels, self.predictions, self.confidence, strict=True)
        wrong = sorted((one for one in each if one[1] != one[2]), key=lambda one: -one[3])

        def name(row: int, label: int) -> str:
            names = task.labels if examples.choices is None else examples.choices[row]
            return str((names or {})[label])[:TEXT]

        return [
            {
                "row": row,
                "text": [part[:TEXT] for part in examples.texts[row]],
                "label": name(row, label),
                "predicted": name(row, predicted),
                "confidence": confidence,
            }
            for row, label, predicted, confidence in wrong[:ERRORS]
        ]


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


def main_score(metrics: Mapping[str, Mapping[str, float]], tasks: Sequence[TaskConfig]) -> float:
    """Return the value of `main_metric`, given the metrics by split, as in result.json."""
    splits = {split: next((t for t in tasks if split.startswith(f"{t.name}/")), tasks[0]) for split in metrics}
    values = [metrics[name.rpartition("/")[0]][name.rpartition("/")[2]] for name in main_metrics(splits)]
    return sum(values) / len(values)


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

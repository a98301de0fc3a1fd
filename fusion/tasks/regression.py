"""`kind: regression`: one number per text or pair of texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from fusion.tasks.columns import Column
from fusion.tasks.kind import Decision, Kind, Lines, RawLabels
from fusion.tasks.labels import Labels, ignore_hint, label_key, parse_number
from fusion.tasks.task import Task
from fusion.text import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_LARGEST = 3.4028234e38  # largest float32; the loss is computed in float32
_NOT_FINITE = re.compile(r"[-+]?(nan|inf|infinity)", re.IGNORECASE)


class Regression(Kind):
    name = "regression"
    metric_names = ("pearson", "spearman")

    def read_labels(self, task: Task, column: Column, unlabelled: bool) -> RawLabels:
        # In an untyped file, numbers are strings.
        values = column.values if column.table.typed else [_from_text(value) for value in column.values]
        numbers = replace(column, values=values)
        keys = [label_key(value) for value in values]
        missing = Labels(task).ignored(numbers, keys, unlabelled)
        return RawLabels(missing, lambda kept, _: (_read(task, numbers, kept), None))

    def head_outputs(self, task: Task) -> int:
        return 1

    def loss(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
        """Return the squared error of each example."""
        from torch.nn import functional as F

        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="none")

    def zero_score_loss(self, task: Task, labels: NDArray[Any], choice_counts: NDArray[np.int64] | None) -> float:
        import numpy as np

        return float(np.mean(labels.astype(np.float64) ** 2))

    def constant_loss(self, task: Task, labels: NDArray[Any], choice_counts: NDArray[np.int64] | None) -> float:
        """Return the variance of the labels."""
        import numpy as np

        return float(np.var(labels.astype(np.float64)))

    def constant(self, labels: Sequence[Any]) -> list[Any]:
        """Return no predictions, since the correlation with a constant is undefined."""
        return []

    def affine(self, labels: NDArray[Any]) -> tuple[float, float]:
        """Return standard deviation and mean of the labels."""
        import numpy as np

        values = labels.astype(np.float64)
        return float(values.std()) or 1.0, float(values.mean())

    def outputs(self, logits: Tensor) -> list[Any]:
        return logits.float().squeeze(-1).tolist()

    def lines(self, task: Task, logits: Tensor, counts: Sequence[int] | None, decision: Decision) -> Lines:
        """Yield the predicted value as `score`."""
        yield from ({"score": values[0]} for values in logits.float().tolist())

    def describe(self, task: Task, line: dict[str, Any], label: Any) -> dict[str, Any]:
        return {"predicted": f"{line['score']:.3g}", "truth": f"{label:.3g}", "right": None}

    def wrong(self, labels: Sequence[Any], predictions: Sequence[Any]) -> list[bool]:
        """Return which examples have an error above the median."""
        import torch

        error = (torch.tensor(predictions) - torch.tensor(labels)).abs()  # float32, the precision of the predictions
        return (error > error.median()).tolist()

    def probe_labels(self, labels: Tensor) -> Tensor:
        """Return standardized labels."""
        labels = labels.double()
        return (labels - labels.mean()) / labels.std(correction=0).clamp(min=1e-6)

    def columns(self, task: Task, labels: Tensor, choice_counts: Tensor | None) -> Tensor:
        """Return the values as one column."""
        return labels.double().unsqueeze(1)


def _from_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.strip()
    number = parse_number(text)
    if number is None and _NOT_FINITE.fullmatch(text):
        return float(text)
    return value if number is None else number


def _read(task: Task, column: Column, kept: Sequence[int]) -> list[float]:
    for row in kept:
        value = column.values[row]
        # A comparison, since integers can be too large to convert to float. It is false for NaN.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
            raise UserError(
                f"{column.table.at(row)}: {task.label} is {shown(value)}; expected a finite number\n{ignore_hint(task, value)}"
            )
    return [float(column.values[row]) for row in kept]

"""`kind: regression`: a number per text or pair of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fusion.tasks.columns import Column, Table
from fusion.tasks.kind import Decision, Kind, RawLabels
from fusion.tasks.labels import Labels, label_key, numbers_of, read_values
from fusion.tasks.task import Task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


class Regression(Kind):
    name = "regression"
    metric_names = ("pearson", "spearman")

    @property
    def noun(self) -> str:
        return "a regression"

    def read_labels(self, task: Task, column: Column, table: Table, unlabelled: bool) -> RawLabels:
        names, numbers = Labels(task), numbers_of(column)
        keys = [label_key(value) for value in numbers.values]
        return RawLabels(
            names.ignored(numbers, keys, unlabelled),
            lambda kept, _: (read_values(task, table, numbers, kept), None),
        )

    def head_outputs(self, task: Task) -> int:
        return 1

    def loss(
        self,
        scores: Tensor,
        labels: Tensor,
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Squared error."""
        from torch.nn import functional as F

        return F.mse_loss(scores.float().squeeze(-1), labels.float(), reduction="none")

    def mean_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        from torch.nn import functional as F

        return F.mse_loss(scores.squeeze(-1), labels.to(scores.dtype))

    def zero_score_loss(
        self, task: Task, labels: NDArray[Any], choice_counts: NDArray[np.int64] | None
    ) -> float:
        import numpy as np

        return float(np.mean(labels.astype(np.float64) ** 2))

    def outputs(self, scores: Tensor) -> list[Any]:
        """The value."""
        return scores.float().squeeze(-1).tolist()

    def lines(
        self, task: Task, scores: Tensor, counts: Sequence[int] | None, decision: Decision
    ) -> Iterator[dict[str, Any]]:
        """The value as `score`."""
        yield from ({"score": values[0]} for values in scores.float().tolist())

    def describe(
        self, task: Task, scores: Tensor, label: Any, count: int | None, decision: Decision
    ) -> dict[str, Any]:
        return {"predicted": f"{float(scores[0]):.3g}", "truth": f"{label:.3g}", "right": None}

    def wrong(self, labels: Sequence[Any], predictions: Sequence[Any]) -> list[bool]:
        """Those whose error is above the median."""
        import torch

        # In float32, in which the values were computed.
        off = (
            torch.tensor(predictions, dtype=torch.float32) - torch.tensor(labels, dtype=torch.float32)
        ).abs()
        return (off > off.median()).tolist()

    def probe_labels(self, labels: Tensor) -> Tensor:
        """Standardised."""
        labels = labels.double()
        return (labels - labels.mean()) / labels.std(correction=0).clamp(min=1e-6)

    def columns(self, task: Task, labels: Tensor, choice_counts: Tensor | None) -> Tensor:
        """The values."""
        return labels.double().unsqueeze(1)

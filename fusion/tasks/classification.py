"""`kind: classification`: one of several labels per text or pair of texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from fusion.tasks.columns import Column, Table
from fusion.tasks.kind import Decision, Kind, RawLabels
from fusion.tasks.labels import Labels, read_ids
from fusion.tasks.task import Task
from fusion.text import shortened

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


def check_label_names(task: Task, where: str, least: int = 2) -> None:
    """At least so many different label names, and as many `label_values`.

    Raises:
        UserError: what was expected.
    """
    names = task.labels or []
    if len(names) < least:
        count = "two label names" if least == 2 else "one label name"
        raise UserError(f"{where}: labels={shortened(task.labels)}: expected at least {count}")
    if len(set(names)) != len(names):
        raise UserError(f"{where}: labels={shortened(task.labels)}: a name stands twice")


def check_label_values(task: Task, where: str) -> None:
    """As many `label_values` as labels, where there are any.

    Raises:
        UserError: they are not.
    """
    names = task.labels or []
    if task.label_values is not None and len(task.label_values) != len(names):
        raise UserError(f"{where}: label_values has {len(task.label_values)} entries for {len(names)} labels")


class Classification(Kind):
    name = "classification"
    metric_names: tuple[str, ...] = ("accuracy", "f1", "macro_f1", "matthews")
    has_classes = True
    smooths_labels = True

    def check(self, task: Task, where: str) -> None:
        check_label_names(task, where)
        if "f1" in task.metrics and len(task.labels or []) != 2:
            raise UserError(
                f"{where}: f1 is the F1 of the second of two labels; with {len(task.labels or [])} use macro_f1"
            )
        check_label_values(task, where)

    def read_labels(self, task: Task, column: Column, table: Table, unlabelled: bool) -> RawLabels:
        names = Labels(task)
        keys = names.keys(column)
        return RawLabels(
            names.ignored(column, keys, unlabelled),
            lambda kept, choices: read_ids(names, table, column, keys, kept, choices),
        )

    def loss(
        self,
        scores: Tensor,
        labels: Tensor,
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The terms of `torch.nn.CrossEntropyLoss` before its mean."""
        from torch.nn import functional as F

        return F.cross_entropy(
            scores.float(), labels, weight=class_weights, reduction="none", label_smoothing=label_smoothing
        )

    def mean_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        from torch.nn import functional as F

        return F.cross_entropy(scores, labels)

    def zero_score_loss(
        self, task: Task, labels: NDArray[Any], choice_counts: NDArray[np.int64] | None
    ) -> float:
        return math.log(len(task.labels or [None]))

    def outputs(self, scores: Tensor) -> list[Any]:
        """The index of the best score."""
        return scores.argmax(-1).tolist()

    def lines(
        self, task: Task, scores: Tensor, counts: Sequence[int] | None, decision: Decision
    ) -> Iterator[dict[str, Any]]:
        """`label` and the probabilities as `scores`, by label name."""
        for row, every in enumerate(scores.float().softmax(-1).tolist()):
            values = every[: counts[row]] if counts else every
            names = class_names(task, len(values))
            yield {
                "label": names[values.index(max(values))],
                "scores": dict(zip(names, values, strict=True)),
            }

    def describe(
        self, task: Task, scores: Tensor, label: Any, count: int | None, decision: Decision
    ) -> dict[str, Any]:
        count = len(task.labels or []) if count is None else count
        names = class_names(task, count)
        values = scores[None].float().softmax(-1)[0][:count]
        best = int(values.argmax())
        return {
            "predicted": f"{names[best]} ({float(values[best]):.2f})",
            "truth": names[int(label)],
            "right": best == int(label),
        }

    def columns(self, task: Task, labels: Tensor, choice_counts: Tensor | None) -> Tensor:
        """One-hot classes."""
        from torch.nn import functional as F

        return F.one_hot(labels, len(task.labels or [])).double()


def class_names(task: Task, count: int) -> list[str]:
    """What the K scores of a row are called: the labels, or for choices without names their numbers."""
    if task.labels and len(task.labels) >= count:
        return list(task.labels[:count])
    return [str(number) for number in range(count)]

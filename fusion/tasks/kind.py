"""The interface of a kind of task.

An instance has no state. Heavy imports (torch, numpy) are inside the methods, since task files are validated before
these packages are loaded.

The order of calls for a batch and for a split:

    logits = head(...)                        (B, ...), of the model
    loss(logits, labels)                      (B,), in training
    outputs(logits)                           a JSON-serializable value per example; gathered over batches and processes
    decision(outputs, labels of all examples) values that predictions depend on, selected on the validation split
    predict(outputs, decision)                a JSON-serializable prediction per example
    metrics(labels, predictions)              of all examples

Shapes: B examples, K outputs of the head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusion.tasks.columns import Column
from fusion.tasks.labels import LabelFormat
from fusion.tasks.task import Task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from fusion.layers.heads import TaskHead

    Floats = NDArray[np.float64]

Decision = dict[str, float]
Lines = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class RawLabels:
    """A column of labels before it is read.

    Attributes:
        missing: for each row of the table, whether it has no label.
        read: callable `(rows to keep, choices or words of each, or None) -> (labels, format)`. A label is an int, a
            float, or a list of ints; lists of different lengths are padded in a batch. Raises UserError if a label is
            invalid.
    """

    missing: list[bool]
    read: Callable[[list[int], list[list[str]] | None], tuple[list[Any], LabelFormat | None]]


class Kind(ABC):
    """A kind of task.

    Attributes:
        name: `kind:` of a task file.
        metric_names: the `metrics:` that a task file may list.
        keys: keys of a task file that only this kind has.
        items: what an example contains in addition to its texts: `choices` (one sequence each), `words`, or `None`.
        has_classes: whether each example has one class, so that `loss.class_weights` and stratified splits apply.
        smooths_labels: whether `loss.label_smoothing` applies.
        is_pooled: whether the input of the head is one vector per text, so that a linear probe applies.
    """

    name: str
    metric_names: tuple[str, ...]
    keys: tuple[str, ...] = ()
    items: str | None = None
    has_classes = False
    smooths_labels = False
    is_pooled = True

    def check(self, task: Task, where: str) -> None:  # noqa: B027
        """Raise UserError, which starts with `where`, if a task file is not valid for this kind."""

    @abstractmethod
    def read_labels(self, task: Task, column: Column, unlabelled: bool) -> RawLabels:
        """Prepare the label column of a table. If `unlabelled`, labels may be missing."""

    def plain_labels(self, labels: Tensor | NDArray[Any]) -> list[Any]:
        """Convert labels, (B,) or (B, ...), to the format of `metrics` and outcomes.json."""
        return labels.tolist()

    def head_outputs(self, task: Task) -> int:
        """Return K, by default one output per label."""
        return len(task.labels or [])

    def make_head(self, hidden_size: int, outputs: int, pooling: str = "cls", **options: Any) -> TaskHead:
        """Create a head: (texts, tokens, hidden) -> (texts, K), or (B, words, K) regardless of `pooling`.

        `options`: see `TaskHead`.
        """
        from fusion.layers.heads import TaskHead

        return TaskHead(hidden_size, outputs, "words" if self.items == "words" else pooling, **options)

    def initial_bias(self, task: Task, labels: NDArray[Any], class_weights: Floats | None) -> Floats | None:
        """Return the bias (K,) with which a head that ignores its input predicts the label distribution.

        `None` for zeros.
        """
        return None

    def affine(self, labels: NDArray[Any]) -> tuple[float, float]:
        """Return scale and shift of the output of a head in training."""
        return 1.0, 0.0

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
        """Return the loss (B,) of each example, in the precision of the logits, before the mean over the batch.

        Args:
            logits: (B, K).
            labels: (B,) or (B, ...).
            weight: (K,), weight of each class; `None` unless `has_classes`.
            smoothing: value of `loss.label_smoothing`; 0.0 unless `smooths_labels`.
        """

    def loss_weights(self, labels: NDArray[Any], class_weights: Floats | None) -> Floats | None:
        """Return the weight of each example of a split in the mean loss, or `None` if all are equal.

        The mean divides the sum of `loss` over the batches of all processes by the sum of these weights.
        """
        return None if class_weights is None else class_weights[labels]

    def mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of all examples, for analysis and the linear probe."""
        return self.loss(logits, labels).mean()

    def zero_score_loss(self, task: Task, labels: NDArray[Any], choice_counts: NDArray[np.int64] | None) -> float:
        """Return the mean loss of all-zero logits, without class weights or label smoothing."""
        return math.log(max(1, self.head_outputs(task)))

    def constant_loss(self, task: Task, labels: NDArray[Any], choice_counts: NDArray[np.int64] | None) -> float:
        """Return the lowest mean loss of logits that are equal for all examples, without class weights."""
        return self.zero_score_loss(task, labels, choice_counts)

    def constant(self, labels: Sequence[Any]) -> list[Any]:
        """Return predictions that are equal for all examples: the most frequent label. Empty if there is no such label."""
        ((most, _),) = Counter(map(repr, labels)).most_common(1)
        return [next(label for label in labels if repr(label) == most)] * len(labels)

    @abstractmethod
    def outputs(self, logits: Tensor) -> list[Any]:
        """Convert the logits (B, K) of each example to a JSON-serializable value, the input of `predict`."""

    def confidence(self, logits: Tensor) -> list[float]:
        """Return the probability of each prediction, (B,); empty if the kind has none."""
        return []

    def decision(self, task: Task, outputs: Sequence[Any], labels: Sequence[Any]) -> Decision:
        """Return values that predictions depend on in addition to the outputs, selected on the validation split.

        They are stored in the manifest for `evaluate`, `predict` and `inspect`.
        """
        return {}

    def predict(self, outputs: Sequence[Any], decision: Decision) -> list[Any]:
        """Return the prediction for each example, in the format of `metrics` and outcomes.json."""
        return list(outputs)

    def metrics(self, task: Task, labels: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        """Compute all metrics of the task over all examples, in double precision."""
        import numpy as np

        from fusion.tasks.metrics import metric_of

        one, other = np.asarray(labels)[None], np.asarray(predictions)[None]
        return {name: float(metric_of(name, one, other)[0]) for name in task.metrics}

    @abstractmethod
    def lines(self, task: Task, logits: Tensor, counts: Sequence[int] | None, decision: Decision) -> Lines:
        """Yield the output of `fusion.predict` for each example, given logits (B, K), -inf for missing choices or words.

        `counts` is the number of choices or words of each example, or `None` for plain texts.
        """

    @abstractmethod
    def describe(self, task: Task, line: dict[str, Any], label: Any) -> dict[str, Any]:
        """Describe one example: `predicted` and `truth` as strings, and whether the prediction is `right` (or `None`).

        `line` is an item of `lines`, `label` one returned by `RawLabels.read`.
        """

    def wrong(self, labels: Sequence[Any], predictions: Sequence[Any]) -> list[bool]:
        """Return which examples were misclassified."""
        return [label != prediction for label, prediction in zip(labels, predictions, strict=True)]

    def probe_labels(self, labels: Tensor) -> Tensor:
        """Convert labels to the targets of the linear probe: (B,) or (B, ...)."""
        return labels

    def columns(self, task: Task, labels: Tensor, choice_counts: Tensor | None) -> Tensor:
        """Return the targets of LogME, a linear model of the pooled states: (texts, columns) float64."""
        raise NotImplementedError

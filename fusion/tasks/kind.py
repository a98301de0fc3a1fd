"""The interface of a kind of task.

An instance has no state. Heavy imports (torch, numpy) happen inside the methods, since task files are checked before
any of that is loaded.

The order of calls for a batch and for a split:

    scores = head(...)                        (B, ...), of the model
    loss(scores, labels)                      (B,), in training
    outputs(scores)                           a JSON-able value per example; gathered over batches and processes
    decision(outputs, labels of all examples) numbers that the predictions depend on, chosen on the validation split
    predict(outputs, decision)                a JSON-able prediction per example
    metrics(labels, predictions)              of all examples

Shapes: B examples, K outputs of the head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
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
        read: from the rows to keep, and the choices or words of each (None: rows are plain texts), to their labels and
            the format of these. A label is an int, a float, or a list of ints; lists of different lengths are padded
            in a batch. Raises UserError, which names the row.
    """

    missing: list[bool]
    read: Callable[[list[int], list[list[str]] | None], tuple[list[Any], LabelFormat | None]]


class Kind(ABC):
    """A kind of task.

    Attributes:
        name: `kind:` of a task file.
        noun: the kind in a sentence.
        metric_names: the `metrics:` that a task file may list.
        keys: keys of a task file that only this kind has.
        items: what a row consists of besides its texts: `choices` (a sequence of tokens each), `words`, or None.
        has_classes: whether an example has one class: `loss.class_weights` and stratified splits apply.
        smooths_labels: whether `loss.label_smoothing` applies.
        is_pooled: whether the head scores one vector per text, so that a linear probe is meaningful.
    """

    name: str
    metric_names: tuple[str, ...]
    keys: tuple[str, ...] = ()
    items: str | None = None
    has_classes = False
    smooths_labels = False
    is_pooled = True

    @property
    def noun(self) -> str:
        return f"a task of kind {self.name}"

    # --- task file and data ---------------------------------------------------------------------------

    def check(self, task: Task, where: str) -> None:  # noqa: B027
        """Refuse a task file that this kind cannot use, with a UserError that starts with `where`."""

    @abstractmethod
    def read_labels(self, task: Task, column: Column, unlabelled: bool) -> RawLabels:
        """Prepare the column of labels of a table; `unlabelled`: rows may be without labels."""

    def plain_labels(self, labels: Tensor | NDArray[Any]) -> list[Any]:
        """The labels of a batch or a split, (B,) or (B, ...), as `metrics` takes them and outcomes.json has them."""
        return labels.tolist()

    # --- head and loss --------------------------------------------------------------------------------

    def head_outputs(self, task: Task) -> int:
        """K: an output per label."""
        return len(task.labels or [])

    def make_head(
        self, hidden_size: int, outputs: int, pooling: str = "cls", layers: int = 1, dropout: float = 0.0
    ) -> TaskHead:
        """A new head: (texts, tokens, hidden) -> (texts, K)."""
        from fusion.layers.heads import TaskHead

        return TaskHead(hidden_size, outputs, pooling, layers, dropout)

    @abstractmethod
    def loss(self, scores: Tensor, labels: Tensor, weight: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
        """The loss of each example, in the precision of the scores, before the mean over the batch.

        Args:
            scores: (B, K).
            labels: (B,) or (B, ...).
            weight: of each class, (K,); None unless `has_classes`.
            smoothing: `loss.label_smoothing`; 0.0 unless `smooths_labels`.

        Returns:
            (B,).
        """

    def loss_weights(self, labels: NDArray[Any], class_weights: Floats | None) -> Floats | None:
        """The weight of each example of a split in the mean loss; None: all are equal.

        The mean divides the sum of `loss` over the batch, all processes together, by the sum of these.
        """
        return None if class_weights is None else class_weights[labels]

    def mean_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of all examples; for analysis and the linear probe."""
        return self.loss(scores, labels).mean()

    def zero_score_loss(self, task: Task, labels: NDArray[Any], choice_counts: NDArray[np.int64] | None) -> float:
        """The mean loss of scores that are all zero, without class weights and label smoothing."""
        return math.log(max(1, self.head_outputs(task)))

    # --- predictions and metrics ----------------------------------------------------------------------

    @abstractmethod
    def outputs(self, scores: Tensor) -> list[Any]:
        """A JSON-able value of each example's scores, from which `predict` makes the prediction.

        Args:
            scores: (B, K); -inf where a row has fewer choices or words than another.
        """

    def decision(self, task: Task, outputs: Sequence[Any], labels: Sequence[Any]) -> Decision:
        """Numbers that predictions depend on besides the outputs, chosen on the validation split.

        They are stored in the manifest for `evaluate`, `predict` and `inspect`.
        """
        return {}

    def predict(self, outputs: Sequence[Any], decision: Decision) -> list[Any]:
        """The prediction for each example, as `metrics` takes it and outcomes.json has it."""
        return list(outputs)

    def metrics(self, task: Task, labels: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        """All metrics of the task over all examples at once, in double precision."""
        import numpy as np

        from fusion.tasks.metrics import metric_of

        one, other = np.asarray(labels)[None], np.asarray(predictions)[None]
        return {name: float(metric_of(name, one, other)[0]) for name in task.metrics}

    # --- wording --------------------------------------------------------------------------------------

    @abstractmethod
    def lines(self, task: Task, scores: Tensor, counts: Sequence[int] | None, decision: Decision) -> Lines:
        """What `fusion.predict` writes for each example.

        Args:
            scores: (B, K).
            counts: choices or words of each example; None: rows are plain texts.
        """

    @abstractmethod
    def describe(self, task: Task, line: dict[str, Any], label: Any) -> dict[str, Any]:
        """`predicted` and `truth` of one example in words, and whether it is `right` (or None).

        Args:
            line: of `lines`.
            label: as `RawLabels.read` gives it.
        """

    def wrong(self, labels: Sequence[Any], predictions: Sequence[Any]) -> list[bool]:
        """Which examples were predicted wrong."""
        return [label != prediction for label, prediction in zip(labels, predictions, strict=True)]

    def text_of(self, prediction: Any) -> int:
        """The index of the text of an example that was predicted; 0 except for choices."""
        return 0

    # --- linear probe and LogME -----------------------------------------------------------------------

    def probe_labels(self, labels: Tensor) -> Tensor:
        """Labels as the linear probe fits them: (B,) or (B, ...)."""
        return labels

    def columns(self, task: Task, labels: Tensor, choice_counts: Tensor | None) -> Tensor:
        """(texts, columns) float64: the targets of a linear model of the pooled states, for LogME."""
        raise NotImplementedError

"""`kind: classification`: one of multiple labels per text or pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from fusion.tasks.columns import Column
from fusion.tasks.kind import Decision, Kind, Lines, RawLabels
from fusion.tasks.labels import Labels
from fusion.tasks.task import Task
from fusion.text import listed, repeated, shortened

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from fusion.tasks.kind import Floats


def check_labels(task: Task, where: str, least: int = 2) -> None:
    """Raise UserError if there are fewer than `least` distinct label names, or `label_values` has a different length."""
    names = task.labels or []
    what = f"{where}: labels={shortened(task.labels)}"
    if len(names) < least:
        raise UserError(f"{what}: expected at least {least} label name{'s' if least > 1 else ''}")
    if twice := repeated(names):
        raise UserError(f"{what}: duplicate {listed(twice)}; expected each name once")
    if task.label_values is not None and len(task.label_values) != len(names):
        raise UserError(f"{where}: label_values has {len(task.label_values)} entries for {len(names)} labels")


def log_prior(labels: NDArray[Any], count: int, class_weights: Floats | None = None) -> Floats:
    """Return the log prior of `count` classes with mean 0, with one more example of each, so that it is finite.

    Negative labels are padding.
    """
    import numpy as np

    counts = np.bincount(labels[labels >= 0], minlength=count) + 1.0
    found = np.log(counts if class_weights is None else counts * class_weights)
    return np.asarray(found - found.mean())


def label_entropy(labels: NDArray[Any]) -> float:
    """Return the entropy of the label distribution in nats; negative labels are padding."""
    import numpy as np
    from scipy.stats import entropy

    return float(entropy(np.bincount(labels[labels >= 0])))


class Classification(Kind):
    name = "classification"
    metric_names: tuple[str, ...] = ("accuracy", "f1", "macro_f1", "matthews")
    has_classes = True
    smooths_labels = True

    def check(self, task: Task, where: str) -> None:
        check_labels(task, where)
        if "f1" in task.metrics and len(task.labels or []) != 2:
            raise UserError(f"{where}: f1 needs exactly two labels; use macro_f1 for {len(task.labels or [])} labels")

    def read_labels(self, task: Task, column: Column, unlabelled: bool) -> RawLabels:
        names = Labels(task)
        keys = names.keys(column)
        return RawLabels(
            names.ignored(column, keys, unlabelled), lambda kept, choices: names.read(column, keys, kept, choices)
        )

    def loss(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
        """Return the cross entropy of each example, as `torch.nn.CrossEntropyLoss` computes it."""
        from torch.nn import functional as F

        return F.cross_entropy(logits, labels, weight=weight, reduction="none", label_smoothing=smoothing)

    def initial_bias(self, task: Task, labels: NDArray[Any], class_weights: Floats | None) -> Floats | None:
        return log_prior(labels, self.head_outputs(task), class_weights)

    def constant_loss(self, task: Task, labels: NDArray[Any], choice_counts: NDArray[np.int64] | None) -> float:
        return label_entropy(labels)

    def outputs(self, logits: Tensor) -> list[Any]:
        return logits.argmax(-1).tolist()

    def confidence(self, logits: Tensor) -> list[float]:
        return [round(value, 5) for value in logits.float().softmax(-1).amax(-1).tolist()]

    def lines(self, task: Task, logits: Tensor, counts: Sequence[int] | None, decision: Decision) -> Lines:
        """Yield the `label` and, as `scores`, the probabilities by label name."""
        for row, every in enumerate(logits.float().softmax(-1).tolist()):
            values = every[: counts[row]] if counts else every
            names = list(task.labels or [])[: len(values)]
            if len(names) < len(values):  # choices without names
                names = [str(index) for index in range(len(values))]
            yield {"label": names[values.index(max(values))], "scores": dict(zip(names, values, strict=True))}

    def describe(self, task: Task, line: dict[str, Any], label: Any) -> dict[str, Any]:
        predicted, truth = line["label"], list(line["scores"])[int(label)]
        shown = f"{predicted} ({line['scores'][predicted]:.2f})"
        return {"predicted": shown, "truth": truth, "right": predicted == truth}

    def columns(self, task: Task, labels: Tensor, choice_counts: Tensor | None) -> Tensor:
        """Return one-hot classes."""
        from torch.nn import functional as F

        return F.one_hot(labels, len(task.labels or [])).double()

"""`kind: multi_label`: zero or more labels per text or pair of texts.

The head has one output per label, whose sigmoid is the probability of the label; all labels share one threshold. Each
evaluation on the validation split selects the threshold that maximizes the task's first metric, so validation metrics
are optimistic (as is the best epoch's metric). The artifact stores the threshold of its epoch for the test split.

Shapes: B examples, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from fusion.tasks.classification import check_labels
from fusion.tasks.columns import Column
from fusion.tasks.kind import Decision, Kind, Lines, RawLabels
from fusion.tasks.labels import LabelFormat, Labels
from fusion.tasks.task import Task
from fusion.text import listed, repeated, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

SEPARATOR = "|"  # of the labels in a cell of a CSV or TSV file
_TIE = 1e-12  # metrics that differ by less are equal


class MultiLabel(Kind):
    name = "multi_label"
    metric_names = ("micro_f1", "macro_f1", "subset_accuracy")

    def check(self, task: Task, where: str) -> None:
        check_labels(task, where, least=1)

    def read_labels(self, task: Task, column: Column, unlabelled: bool) -> RawLabels:
        """Prepare a column of lists of raw labels, in CSV and TSV files joined by `SEPARATOR`.

        A value of `ignore_labels` marks an example without labels if it is the whole value of a row (such as null),
        and is removed from lists that contain it.
        """
        names = Labels(task)
        values = column.values if column.table.typed else _from_text(column.values, unlabelled)
        missing = names.ignored(Column(values, column.table), [names.key(value) for value in values], unlabelled)

        def read(kept: list[int], _: Any) -> tuple[list[Any], LabelFormat]:
            """Return a list of 0 or 1 per label for each row."""
            ids, written = names.read_lists(replace(column, values=values), kept)
            for row, own in zip(kept, ids, strict=True):
                if twice := repeated(names.names[label] for label in own):
                    raise UserError(
                        f"{column.table.at(row)}: {task.label} is {shown(values[row])}: duplicate {listed(twice)}; expected "
                        "each label once"
                    )
            return _indicators(ids, len(names.names)).astype(int).tolist(), written

        return RawLabels(missing, read)

    def plain_labels(self, labels: Tensor | NDArray[Any]) -> list[Any]:
        """Return the label ids of each example, in ascending order."""
        return [[number for number, is_set in enumerate(row) if is_set] for row in labels.tolist()]

    def loss(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
        """Return the binary cross entropy averaged over labels, as in `torch.nn.BCEWithLogitsLoss`.

        logits, labels: (B, K).
        """
        from torch.nn import functional as F

        losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        return losses.mean(-1)

    def zero_score_loss(self, task: Task, labels: NDArray[Any], choice_counts: NDArray[np.int64] | None) -> float:
        return math.log(2)

    def constant_loss(self, task: Task, labels: NDArray[Any], choice_counts: NDArray[np.int64] | None) -> float:
        """Return the entropy of the occurrence of a label, averaged over labels."""
        from scipy.stats import entropy

        share = labels.mean(0)
        return float(entropy([share, 1 - share]).mean())

    def initial_bias(
        self, task: Task, labels: NDArray[Any], class_weights: NDArray[np.float64] | None
    ) -> NDArray[np.float64] | None:
        """Return the log odds of each label, with one more example with it and one without it."""
        import numpy as np

        positive = labels.sum(0) + 1.0
        return np.asarray(np.log(positive) - np.log(len(labels) + 2.0 - positive))

    def outputs(self, logits: Tensor) -> list[Any]:
        """Return the probability of each label."""
        return logits.float().sigmoid().tolist()

    def decision(self, task: Task, outputs: Sequence[Any], labels: Sequence[Any]) -> Decision:
        if not outputs:
            return {}
        import numpy as np

        true = _indicators(labels, len(task.labels or []))
        probabilities = np.nan_to_num(np.asarray(outputs, np.float64))  # NaN is predicted as no label
        return {"threshold": best_threshold(task.metrics[0], probabilities, true)}

    def predict(self, outputs: Sequence[Any], decision: Decision) -> list[Any]:
        """Return the ids of the labels whose probability is at least the threshold (0.5 if `decision` is empty)."""
        threshold = decision.get("threshold", 0.5)
        return [[number for number, value in enumerate(row) if value >= threshold] for row in outputs]

    def metrics(self, task: Task, labels: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        """Compute the metrics as scikit-learn does for label indicators with `zero_division=0`.

        micro_f1: F1 over all (example, label) pairs. macro_f1: mean F1 over all labels of the task; 0 for a label that
        neither occurs nor is predicted. subset_accuracy: fraction of examples whose labels are all correct.
        """
        count = len(task.labels or [])
        true, predicted = _indicators(labels, count), _indicators(predictions, count)
        both, sizes = true & predicted, (true, predicted)
        by_label = _f1(both.sum(0), sum(size.sum(0) for size in sizes))
        values = {
            "micro_f1": _f1(both.sum(), sum(size.sum() for size in sizes)),
            "macro_f1": by_label.mean(),
            "subset_accuracy": (true == predicted).all(1).mean() if len(true) else 0.0,
        }
        return {name: float(values[name]) for name in task.metrics}

    def lines(self, task: Task, logits: Tensor, counts: Sequence[int] | None, decision: Decision) -> Lines:
        """Yield the predicted `labels` and, as `scores`, the probabilities by label name."""
        names, outputs = list(task.labels or []), self.outputs(logits)
        for ids, values in zip(self.predict(outputs, decision), outputs, strict=True):
            yield {"labels": [names[number] for number in ids], "scores": dict(zip(names, values, strict=True))}

    def describe(self, task: Task, line: dict[str, Any], label: Any) -> dict[str, Any]:
        truth = [name for name, is_set in zip(line["scores"], label, strict=True) if is_set]
        predicted = [f"{name} ({line['scores'][name]:.2f})" for name in line["labels"]]
        return {
            "predicted": ", ".join(predicted) or "no label",
            "truth": ", ".join(truth) or "no label",
            "right": line["labels"] == truth,
        }

    def columns(self, task: Task, labels: Tensor, choice_counts: Tensor | None) -> Tensor:
        """Return one indicator column per label."""
        return labels.double()


def _from_text(values: Sequence[Any], unlabelled: bool) -> list[Any]:
    """Split the cells of an untyped file into lists. An `unlabelled` column without any value is returned unchanged."""
    if unlabelled and not any(values):
        return list(values)
    return [[part.strip() for part in str(value).split(SEPARATOR)] if value else [] for value in values]


def _indicators(ids: Sequence[Sequence[int]], count: int) -> NDArray[np.bool_]:
    """Return label indicators, (B, K)."""
    import numpy as np

    found = np.zeros((len(ids), count), bool)
    for row, own in enumerate(ids):
        found[row, list(own)] = True
    return found


def _f1(both: Any, sizes: Any) -> Any:
    """2 · |both| / (|true| + |predicted|); 0 if both are empty."""
    import numpy as np

    return np.divide(2.0 * both, sizes, out=np.zeros(np.shape(both)), where=np.asarray(sizes) > 0)


def _all_correct(both: Any, sizes: Any) -> Any:
    return (2 * both == sizes) * 1.0


def best_threshold(metric: str, probabilities: NDArray[np.float64], true: NDArray[np.bool_]) -> float:
    """Return the threshold that maximizes the metric; of ties, the one closest to 0.5.

    It is the midpoint of two neighboring probabilities, so that rounding does not change predictions.
    probabilities, true: (B, K).
    """
    import numpy as np
    import pandas as pd

    # Lower the threshold step by step: (example, label) pairs become positive in descending order of probability. The
    # metric is the mean over groups of pairs (all, those of a label, those of an example) of a function of the group's
    # positives, so a pair only changes the value of its own group.
    rows, labels = np.indices(true.shape).reshape(2, -1)
    group_of: dict[str, tuple[NDArray[np.intp], Callable[[Any, Any], Any]]] = {
        "micro_f1": (np.zeros_like(rows), _f1),
        "macro_f1": (labels, _f1),
        "subset_accuracy": (rows, _all_correct),
    }
    groups, value = group_of[metric]
    order = np.argsort(-probabilities.ravel(), kind="stable")
    falling = probabilities.ravel()[order]
    pairs = pd.DataFrame({"group": groups[order], "positive": true.ravel()[order]})
    positive = pairs.groupby("group").positive
    earlier = positive.cumcount().to_numpy()  # pairs of the same group that are already positive
    hits, size = positive.cumsum().to_numpy(float), positive.transform("sum").to_numpy(float)
    values, unset = value(hits, size + earlier + 1), value(0.0 * size, size)
    first = earlier == 0
    before = np.where(first, unset, pairs.assign(values=values).groupby("group")["values"].shift())
    scores = unset[first].sum() + np.concatenate([[0.0], np.cumsum(values - before)])
    edges = np.concatenate([[1.0], falling, [0.0]])
    thresholds = (edges[:-1] + edges[1:]) / 2
    possible = np.concatenate([edges[:-2] > falling, [True]])  # not between equal probabilities
    best = possible & (scores >= scores[possible].max() - _TIE * first.sum())
    return float(thresholds[best][np.abs(thresholds[best] - 0.5).argmin()])

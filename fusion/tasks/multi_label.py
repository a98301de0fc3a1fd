"""`kind: multi_label`: any number of labels per text or pair of texts, none included.

An output of the head per label, its sigmoid the probability of that label, and one threshold for all labels. The
threshold is chosen at each evaluation on the validation split: the one at which the task's first metric is highest. So
validation scores in training are optimistic, as those of the best epoch are in any case; the artifact stores the
threshold of its epoch, and a test split is scored with that.

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

SEPARATOR = "|"  # of the names in a cell of a CSV or TSV file
_TIE = 1e-12  # scores that differ by less are equal


class MultiLabel(Kind):
    name = "multi_label"
    metric_names = ("micro_f1", "macro_f1", "subset_accuracy")

    def check(self, task: Task, where: str) -> None:
        check_labels(task, where, least=1)

    # --- labels ---------------------------------------------------------------------------------------

    def read_labels(self, task: Task, column: Column, unlabelled: bool) -> RawLabels:
        """A row has a list of raw labels, or in a CSV or TSV file text with `SEPARATOR` between them.

        An entry of `ignore_labels` is a row without labels where it is the row's value (null), and is left out of a
        list that has it.
        """
        names = Labels(task)
        values = column.values if column.table.typed else _from_text(column.values, unlabelled)
        missing = names.ignored(Column(values, column.table), [names.key(value) for value in values], unlabelled)

        def read(kept: list[int], _: Any) -> tuple[list[Any], LabelFormat]:
            """Whether a row has each of the labels (0 or 1)."""
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
        """The ids of the labels of each example, in their order."""
        return [[number for number, is_set in enumerate(row) if is_set] for row in labels.tolist()]

    # --- head and loss --------------------------------------------------------------------------------

    def loss(self, scores: Tensor, labels: Tensor, weight: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
        """Binary cross entropy, the mean over the labels, as `torch.nn.BCEWithLogitsLoss` has it.

        scores, labels: (B, K).
        """
        from torch.nn import functional as F

        losses = F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")
        return losses.mean(-1)

    def zero_score_loss(self, task: Task, labels: NDArray[Any], choice_counts: NDArray[np.int64] | None) -> float:
        return math.log(2)

    # --- predictions and metrics ----------------------------------------------------------------------

    def outputs(self, scores: Tensor) -> list[Any]:
        """The probability of each label."""
        return scores.float().sigmoid().tolist()

    def decision(self, task: Task, outputs: Sequence[Any], labels: Sequence[Any]) -> Decision:
        if not outputs:
            return {}
        import numpy as np

        true = _indicators(labels, len(task.labels or []))
        probabilities = np.nan_to_num(np.asarray(outputs, np.float64))  # NaN is predicted as no label
        return {"threshold": best_threshold(task.metrics[0], probabilities, true)}

    def predict(self, outputs: Sequence[Any], decision: Decision) -> list[Any]:
        """The ids of the labels whose probability is at least the threshold; 0.5 if none was selected."""
        threshold = decision.get("threshold", 0.5)
        return [[number for number, value in enumerate(row) if value >= threshold] for row in outputs]

    def metrics(self, task: Task, labels: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        """As scikit-learn computes them of label indicators with `zero_division=0`.

        micro_f1: of all (example, label) pairs together. macro_f1: the mean over all labels of the task; 0 for a label
        that no example has and none is predicted to have. subset_accuracy: the share of examples whose labels are all
        right.
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

    # --- wording --------------------------------------------------------------------------------------

    def lines(self, task: Task, scores: Tensor, counts: Sequence[int] | None, decision: Decision) -> Lines:
        """`labels`, those that are predicted, and the probability of each one as `scores`, by label name."""
        names, outputs = list(task.labels or []), self.outputs(scores)
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
        """Whether a text has the label."""
        return labels.double()


def _from_text(values: Sequence[Any], unlabelled: bool) -> list[Any]:
    """The cells of a file without types as lists; unchanged if all are empty in a split that may be without labels."""
    if unlabelled and not any(values):
        return list(values)
    return [[part.strip() for part in str(value).split(SEPARATOR)] if value else [] for value in values]


# --- metrics and threshold ----------------------------------------------------------------------------


def _indicators(ids: Sequence[Sequence[int]], count: int) -> NDArray[np.bool_]:
    """(B, K), whether an example has a label."""
    import numpy as np

    found = np.zeros((len(ids), count), bool)
    for row, own in enumerate(ids):
        found[row, list(own)] = True
    return found


def _f1(both: Any, sizes: Any) -> Any:
    """2 · |both| / (|true| + |predicted|); 0 where neither has any."""
    import numpy as np

    return np.divide(2.0 * both, sizes, out=np.zeros(np.shape(both)), where=np.asarray(sizes) > 0)


def _all_right(both: Any, sizes: Any) -> Any:
    return (2 * both == sizes) * 1.0


def best_threshold(metric: str, probabilities: NDArray[np.float64], true: NDArray[np.bool_]) -> float:
    """The threshold at which the metric is highest, of equally good ones the one closest to 0.5.

    It is halfway between two neighbouring probabilities, so that rounding does not move an example across it.
    probabilities, true: (B, K).
    """
    import numpy as np

    # Lower the threshold step by step: each (example, label) pair turns positive in the order of its probability. A
    # metric is the mean over groups of pairs (all, those of a label, those of an example) of a function of the group's
    # positives, so that a pair changes the value of its own group alone.
    rows, labels = np.indices(true.shape).reshape(2, -1)
    group_of: dict[str, tuple[NDArray[np.intp], Callable[[Any, Any], Any]]] = {
        "micro_f1": (np.zeros_like(rows), _f1),
        "macro_f1": (labels, _f1),
        "subset_accuracy": (rows, _all_right),
    }
    groups, value = group_of[metric]
    order = np.argsort(-probabilities.ravel(), kind="stable")
    groups, positive, falling = groups[order], true.ravel()[order], probabilities.ravel()[order]
    size = np.bincount(groups, positive)  # the true pairs of each group
    by_group = np.argsort(groups, kind="stable")
    grouped = groups[by_group]
    first = np.searchsorted(grouped, grouped)  # where the pair's group starts
    total = np.cumsum(positive[by_group])
    hits = total - total[first] + positive[by_group][first]
    values = value(hits, size[grouped] + np.arange(1, len(grouped) + 1) - first)
    before = np.where(np.arange(len(grouped)) == first, value(0.0 * size, size)[grouped], np.roll(values, 1))
    change = np.empty(len(groups))
    change[by_group] = values - before
    scores = value(0.0 * size, size).sum() + np.concatenate([[0.0], np.cumsum(change)])
    edges = np.concatenate([[1.0], falling, [0.0]])
    thresholds = (edges[:-1] + edges[1:]) / 2
    possible = np.concatenate([edges[:-2] > falling, [True]])  # not between equal probabilities
    best = possible & (scores >= scores[possible].max() - _TIE * len(size))
    return float(thresholds[best][np.abs(thresholds[best] - 0.5).argmin()])

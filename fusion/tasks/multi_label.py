"""`kind: multi_label`: any number of labels per text or pair of texts, none included.

An output of the head per label, its sigmoid the probability of that label, and one threshold for all labels. The
threshold is chosen at each evaluation on the validation split: the one at which the task's first metric is highest. So
the validation scores of a training are optimistic, as those of its best epoch are in any case; the artifact keeps the
threshold of the epoch that it keeps, and a test split is scored with that.

Shapes: B examples, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from fusion.tasks.classification import check_label_names, check_label_values
from fusion.tasks.columns import Column, Table
from fusion.tasks.kind import Decision, Kind, RawLabels
from fusion.tasks.labels import Labels, Reading, read_ids
from fusion.tasks.task import Task
from fusion.text import shown

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
        check_label_names(task, where, least=1)
        check_label_values(task, where)

    # --- labels ---------------------------------------------------------------------------------------

    def read_labels(self, task: Task, column: Column, table: Table, unlabelled: bool) -> RawLabels:
        """A row has a list of raw labels, or in a CSV or TSV file text with `SEPARATOR` between them.

        An entry of `ignore_labels` is a row without labels where it is the row's value (null), and is left out of the
        list where it is in there.
        """
        names = Labels(task)
        rows = column.values if column.typed else _from_text(column.values, unlabelled)
        missing = names.ignored(Column(rows), [names.key(value) for value in rows], unlabelled)
        return RawLabels(missing, lambda kept, _: _read(names, table, replace(column, values=rows), kept))

    def plain_labels(self, labels: Tensor | NDArray[Any]) -> list[Any]:
        """The ids of the labels of each example, in their order."""
        return [[number for number, is_set in enumerate(row) if is_set] for row in labels.tolist()]

    # --- head and loss --------------------------------------------------------------------------------

    def loss(
        self,
        scores: Tensor,
        labels: Tensor,
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Binary cross entropy, the mean over the labels, as `torch.nn.BCEWithLogitsLoss` has it.

        scores, labels: (B, K).
        """
        from torch.nn import functional as F

        losses = F.binary_cross_entropy_with_logits(scores.float(), labels.float(), reduction="none")
        return losses.mean(-1)

    def mean_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        from torch.nn import functional as F

        return F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype))

    def zero_score_loss(
        self, task: Task, labels: NDArray[Any], choice_counts: NDArray[np.int64] | None
    ) -> float:
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
        probabilities = np.nan_to_num(
            np.asarray(outputs, np.float64), nan=0.0
        )  # `predict` takes neither for a label
        return {"threshold": best_threshold(task.metrics[0], probabilities, true)}

    def predict(self, outputs: Sequence[Any], decision: Decision) -> list[Any]:
        """The ids of the labels whose probability is at least the threshold; 0.5 where none was chosen."""
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

    def lines(
        self, task: Task, scores: Tensor, counts: Sequence[int] | None, decision: Decision
    ) -> Iterator[dict[str, Any]]:
        """`labels`, those that are predicted, and the probability of each one as `scores`, by label name."""
        names, outputs = list(task.labels or []), self.outputs(scores)
        for ids, values in zip(self.predict(outputs, decision), outputs, strict=True):
            yield {
                "labels": [names[number] for number in ids],
                "scores": dict(zip(names, values, strict=True)),
            }

    def describe(
        self, task: Task, scores: Tensor, label: Any, count: int | None, decision: Decision
    ) -> dict[str, Any]:
        names, outputs = list(task.labels or []), self.outputs(scores[None])
        (ids,), (values,) = self.predict(outputs, decision), outputs
        right = [number for number, is_set in enumerate(label) if is_set]
        return {
            "predicted": ", ".join(f"{names[number]} ({values[number]:.2f})" for number in ids) or "no label",
            "truth": ", ".join(names[number] for number in right) or "no label",
            "right": ids == right,
        }

    def columns(self, task: Task, labels: Tensor, choice_counts: Tensor | None) -> Tensor:
        """Whether a text has the label."""
        return labels.double()


def _from_text(values: Sequence[Any], unlabelled: bool) -> list[Any]:
    """The cells of a file without types as lists. An empty one has no label, unless all are empty in a split that may
    be without labels."""
    if unlabelled and not any(values):
        return list(values)
    return [[part.strip() for part in str(value).split(SEPARATOR)] if value else [] for value in values]


def _read(
    names: Labels, table: Table, column: Column, kept: Sequence[int]
) -> tuple[list[list[int]], Reading | None]:
    """Whether a row has each of the labels (0 or 1), and how all raw labels were read.

    Raises:
        UserError: a row has no list, a label twice, or one that is none of the task's; names the row.
    """
    where: list[int] = []  # the row of each raw label
    for row in kept:
        value = column.values[row]
        if not isinstance(value, (list, tuple)):
            raise UserError(
                f"{table.at(row)}: {names.task.label} is {shown(value)}; expected a list of labels, [] for none"
            )
        where += [row] * len(value)
    flat = replace(column, values=[value for row in kept for value in column.values[row]])
    place = table.place
    by_label = replace(
        table,
        row_name=lambda number: table.row_name(where[number]),
        place=None if place is None else lambda number: place(where[number]),
    )
    keys = names.keys(flat)
    ignored = names.ignored(flat, keys, unlabelled=False)
    used = [number for number, is_ignored in enumerate(ignored) if not is_ignored]
    ids, reading = read_ids(names, by_label, flat, keys, used, unit="labels")
    found: dict[int, list[int]] = {row: [0] * len(names.names) for row in kept}
    for number, label in zip(used, ids, strict=True):
        row = where[number]
        if found[row][label]:
            raise UserError(
                f"{table.at(row)}: {names.task.label} is {shown(column.values[row])}, which has "
                f"{names.names[label]} twice; expected each label once"
            )
        found[row][label] = 1
    return list(found.values()), reading


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

    It lies halfway between two neighbouring probabilities, so that rounding does not move an example across it.

    Args:
        metric: micro_f1, macro_f1 or subset_accuracy.
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
    first = np.searchsorted(grouped, grouped)  # where the pair's group begins
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

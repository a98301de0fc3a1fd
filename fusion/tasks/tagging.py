"""`kind: tagging`: one label for each word of a sentence, such as the BIO tags of named entities.

The input is split into words; the label of each is predicted from its first sub-word. The loss is the mean cross
entropy over all words of a batch.

Shapes: B examples of at most W words, K labels.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from fusion.tasks.classification import check_labels, label_entropy, log_prior
from fusion.tasks.columns import Column
from fusion.tasks.kind import Decision, Kind, Lines, RawLabels
from fusion.tasks.labels import LabelFormat, Labels
from fusion.tasks.task import Task
from fusion.text import listed, shortened

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

ENTITY_METRICS = ("entity_f1", "entity_precision", "entity_recall")


class Tagging(Kind):
    name = "tagging"
    metric_names = (*ENTITY_METRICS, "token_accuracy")
    items = "words"
    smooths_labels = True
    is_pooled = False

    def check(self, task: Task, where: str) -> None:
        if not isinstance(task.text, str) and len(task.text) != 1:
            raise UserError(f"{where}: text={shortened(task.text)}: expected one column, with a list of words")
        check_labels(task, where)
        if task.ignore_labels:
            raise UserError(
                f"{where}: ignore_labels={shortened(task.ignore_labels)}: not supported for tagging, since every word has a label; leave it out"
            )
        asked = [metric for metric in task.metrics if metric in ENTITY_METRICS]
        other = [tag for tag in task.labels or [] if not re.fullmatch("O|[BI]-.+", tag)]
        if asked and other:
            raise UserError(
                f"{where}: {asked[0]} needs BIO labels (O, B-TYPE, I-TYPE), but labels contains {listed(other)}; "
                "rename them, or set metrics: [token_accuracy]"
            )
        if asked and not can_count_entities():
            raise UserError(
                f"{where}: {asked[0]} needs the package nervaluate (Python 3.11 or newer): pip install nervaluate, "
                "or set metrics: [token_accuracy]"
            )

    def read_labels(self, task: Task, column: Column, unlabelled: bool) -> RawLabels:
        """Prepare a column of lists with one raw label per word."""

        def read(kept: list[int], words: list[list[str]] | None) -> tuple[list[Any], LabelFormat]:
            assert words is not None
            for row, sentence in zip(kept, words, strict=True):
                value = column.values[row]
                if isinstance(value, (list, tuple)) and len(value) != len(sentence):
                    raise UserError(
                        f"{column.table.at(row)}: {task.label} has {len(value)} labels for {len(sentence)} words; expected one "
                        "per word (fix or remove the row)"
                    )
            return Labels(task).read_lists(column, kept)

        return RawLabels([value is None and unlabelled for value in column.values], read)

    def plain_labels(self, labels: Tensor | NDArray[Any]) -> list[Any]:
        """Return the label ids of each example's words, without padding."""
        return [[number for number in row if number >= 0] for row in labels.tolist()]

    def loss(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
        """Return the cross entropy summed over words; `loss_weights` makes it a mean over all words of a batch.

        Args:
            logits: (B, W, K).
            labels: (B, W), negative for padding.
        """
        from torch.nn import functional as F

        real = labels >= 0
        losses = F.cross_entropy(logits[real], labels[real], reduction="none", label_smoothing=smoothing)
        return losses.new_zeros(labels.shape).masked_scatter(real, losses).sum(-1)

    def loss_weights(self, labels: NDArray[Any], class_weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
        """Return the number of words of each sentence."""
        return (labels >= 0).sum(-1).astype(float)

    def initial_bias(
        self, task: Task, labels: NDArray[Any], class_weights: NDArray[np.float64] | None
    ) -> NDArray[np.float64]:
        return log_prior(labels, self.head_outputs(task))

    def constant_loss(self, task: Task, labels: NDArray[Any], choice_counts: NDArray[np.int64] | None) -> float:
        return label_entropy(labels)

    def constant(self, labels: Sequence[Any]) -> list[Any]:
        """Return the most frequent tag for each word."""
        words = [tag for row in labels for tag in row]
        most = super().constant(words)[:1]
        return [most * len(row) for row in labels]

    def mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss(logits, labels).sum() / (labels >= 0).sum()

    def outputs(self, logits: Tensor) -> list[Any]:
        """Return the predicted label id of each word."""
        lengths = (~logits.isneginf().all(-1)).sum(-1).tolist()  # all logits of the padding are -inf
        return [row[:length] for row, length in zip(logits.argmax(-1).tolist(), lengths, strict=True)]

    def metrics(self, task: Task, labels: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        """Compute entity metrics, and token_accuracy, the fraction of correctly tagged words."""
        values: dict[str, float] = {}
        if any(metric in ENTITY_METRICS for metric in task.metrics):
            names = list(task.labels or [])
            tags = ([[names[number] for number in row] for row in rows] for rows in (labels, predictions))
            values = entity_scores(entity_counts(*tags))
        words = sum(map(len, labels))
        correct = sum(
            one == other
            for row, found in zip(labels, predictions, strict=True)
            for one, other in zip(row, found, strict=True)
        )
        values["token_accuracy"] = correct / words if words else 0.0
        return {name: values[name] for name in task.metrics}

    def lines(self, task: Task, logits: Tensor, counts: Sequence[int] | None, decision: Decision) -> Lines:
        """Yield the `labels` of the words in order and, as `scores`, their probabilities."""
        names = list(task.labels or [])
        best, ids = logits.float().softmax(-1).amax(-1).tolist(), self.outputs(logits)
        for row, values in zip(ids, best, strict=True):
            yield {"labels": [names[number] for number in row], "scores": values[: len(row)]}

    def describe(self, task: Task, line: dict[str, Any], label: Any) -> dict[str, Any]:
        """Describe all tags of the sentence."""
        truth = [task.labels[number] for number in label]
        return {"predicted": " ".join(line["labels"]), "truth": " ".join(truth), "right": line["labels"] == truth}


def can_count_entities() -> bool:
    """Return whether nervaluate is installed, which needs Python 3.11."""
    return importlib.util.find_spec("nervaluate") is not None


def entity_counts(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> NDArray[np.int64]:
    """Count correct, predicted and true entities per sentence, (sentences, 3), from BIO tags, one per word.

    As in CoNLL's `conlleval`, an entity is correct if its words and its type are. An entity starts at `B-X`, and at
    `I-X` after `O` or a different type, so IOB1 tags and invalid tag sequences are also supported.
    """
    import numpy as np
    from nervaluate.loaders import ListLoader
    from nervaluate.strategies import StrictEvaluation

    load, strict = ListLoader().load, StrictEvaluation()
    counts = np.zeros((len(true), 3), np.int64)
    pairs = zip(load(list(map(list, true))), load(list(map(list, predicted))), strict=True)
    for number, (gold, found) in enumerate(pairs):
        if gold or found:
            result, _ = strict.evaluate(gold, found, [])
            counts[number] = result.correct, result.actual, result.possible
    return counts


def entity_scores(counts: NDArray[np.int64]) -> dict[str, float]:
    """Return micro averages over all sentences, from `entity_counts`; 0 if undefined."""
    correct, predicted, true = map(int, counts.sum(0))
    return {
        "entity_f1": 2 * correct / (predicted + true) if predicted + true else 0.0,
        "entity_precision": correct / predicted if predicted else 0.0,
        "entity_recall": correct / true if true else 0.0,
    }

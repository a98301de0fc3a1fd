"""Errors of classifications: scores per class, confusion matrix, calibration, and the most confident errors.

Shapes: C classes, R examples, M bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusion.reporting.scores import Score
from fusion.reporting.statistics import Predictions
from fusion.reporting.targets import Target
from fusion.tasks.metrics import confusion_of, f1_by_class, ratio

BINS = 10
MOST_CLASSES = 20  # of a confusion matrix in the page
SHOWN_ERRORS = 10

Floats = NDArray[np.float64]


class Bin(NamedTuple):
    """Predictions whose confidence is in one interval."""

    confidence: float  # mean
    accuracy: float
    size: int  # number of predictions


@dataclass(frozen=True)
class ClassScores:
    """Precision, recall and F1 of each class (C,), averaged over runs, and the number of its examples."""

    names: list[str]
    precision: Floats
    recall: Floats
    f1: Floats
    count: NDArray[np.int64]


@dataclass(frozen=True)
class Errors:
    """Errors of one run, or of the runs of one method on one target.

    Attributes:
        confusion: (C, C), fraction of the examples of each class (row) that were predicted as each class, over all runs.
        bins: calibration over all runs; empty if no confidences are stored.
        ece: expected calibration error, averaged over runs; `None` without confidences.
        confident: the most confident errors of the first run that has some, see `RowPredictions.confident_errors`.
    """

    classes: ClassScores
    confusion: Floats
    bins: list[Bin]
    ece: float | None
    confident: list[dict[str, Any]]

    @classmethod
    def of(cls, runs: Sequence[Predictions], names: Sequence[str]) -> Errors | None:
        """Return the errors in the predictions of at least one run; `None` if these are not classes.

        `names`: names of the classes; further classes are named by their number.
        """
        if not all(len(one.labels) and one.labels.dtype.kind == one.predicted.dtype.kind == "i" for one in runs):
            return None
        classes = max(len(names), *(int(max(one.labels.max(), one.predicted.max())) + 1 for one in runs))
        every = [*names, *map(str, range(len(names), classes))]
        counts = np.concatenate([confusion_of(one.labels[None], one.predicted[None], classes) for one in runs])
        calibrated = [(one.confidence, one.labels == one.predicted) for one in runs if one.confidence is not None]
        bins, ece = list[Bin](), None
        if calibrated:
            confidences, right = ([one[n] for one in calibrated] for n in (0, 1))
            bins = calibration(np.concatenate(confidences), np.concatenate(right))
            ece = float(np.mean([expected_error(calibration(*one)) for one in calibrated]))
        confusion = ratio(counts.sum(0), np.broadcast_to(counts.sum((0, 2))[:, None], counts.shape[1:]))
        confident = next((list(one.errors) for one in runs if one.errors), [])[:SHOWN_ERRORS]
        return cls(_class_scores(every, counts), confusion, bins, ece, confident)


def errors_of(target: Target) -> dict[str, Errors]:
    """Return the errors of the best group of each method whose predictions are stored, by method."""
    found = {}
    for method, group in target.groups.items():
        stored = [entry.predictions for entry in group.entries if entry.predictions is not None]
        if stored and len(stored) == len(group.entries):
            names = class_names(group.entries[0], target.task)
            if (errors := Errors.of(stored, names)) is not None:
                found[method] = errors
    return found


def class_names(entry: Score, task: str) -> list[str]:
    """Return the names of the labels in the config of the run or of its training run; empty if unknown (choices)."""
    for run in (entry.run, entry.trained and entry.trained.run):
        for config in _tasks(run.config if run else {}):
            if config.get("name") == task and isinstance(config.get("labels"), list):
                return [str(name) for name in config["labels"]]
    return []


def _tasks(config: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    tasks = config.get("tasks") or [config.get("task")]
    return [task for task in tasks if isinstance(task, dict)]


def _class_scores(names: list[str], confusion: Floats) -> ClassScores:
    """confusion: (runs, C, C)."""
    hits = np.einsum("rcc->rc", confusion)
    precision, recall = (ratio(hits, confusion.sum(axis)).mean(0) for axis in (1, 2))
    return ClassScores(names, precision, recall, f1_by_class(confusion).mean(0), confusion[0].sum(1).astype(int))


def calibration(confidence: Floats, right: NDArray[np.bool_], bins: int = BINS) -> list[Bin]:
    """Divide predictions into intervals of equal width by their confidence (R,); empty intervals are omitted."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        Bin(float(confidence[place == n].mean()), float(right[place == n].mean()), int((place == n).sum()))
        for n in range(bins)
        if (place == n).any()
    ]


def expected_error(bins: Sequence[Bin]) -> float:
    """Return the expected calibration error, Σ_m n_m / R · |accuracy_m − confidence_m| (Guo et al. 2017, equation 3)."""
    total = sum(one.size for one in bins)
    return sum(one.size * abs(one.accuracy - one.confidence) for one in bins) / total


def by_labels(targets: Sequence[Target]) -> dict[str, dict[str, list[tuple[int, list[float]]]]]:
    """Return the scores by number of training examples: {title: {method: [(examples, scores over seeds)]}}.

    A title is a task, backbone, metric and split for which the targets differ in the number of training examples. The
    group of a method is its best one on the validation split, as in the table of results.
    """
    found: dict[tuple[str, str, str, str], dict[str, dict[int, list[float]]]] = {}
    for target in targets:
        for method, group in target.groups.items():
            rows = {n for one in group.trained if (n := training_rows(one.run.result, one.setting[1])) is not None}
            if group.anywhere or len(rows) != 1:
                continue
            key = target.task, group.entries[0].setting[0], target.metric, target.split
            found.setdefault(key, {}).setdefault(method, {})[rows.pop()] = group.scores
    several = {key: methods for key, methods in found.items() if len({n for of in methods.values() for n in of}) > 1}
    backbones = {backbone for _, backbone, *_ in several}
    titles = {
        key: f"{key[0]}: {key[2]} ({key[3]})" + (f", {key[1].rsplit('/', 1)[-1]}" if len(backbones) > 1 else "")
        for key in several
    }
    return {
        titles[key]: {method: sorted(of.items()) for method, of in methods.items()} for key, methods in several.items()
    }


def training_rows(result: Mapping[str, Any], limit: int | None) -> int | None:
    """Return the number of training examples of a run: the limit if there is one, else computed from its speed.

    `None` if a run does not consist of complete epochs.
    """
    try:
        speed, epochs = result["speed"], result["epochs"]
        exact = speed["examples_per_second"] * speed["seconds"] / epochs
    except (KeyError, TypeError, ZeroDivisionError):
        return limit
    rows = round(exact)
    return rows if abs(exact - rows) < 1e-6 * max(rows, 1) and rows > 0 else limit

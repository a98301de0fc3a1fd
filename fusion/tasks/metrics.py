"""Metrics in double precision, used by training, evaluation and the report.

Shapes: B resamples (or one), R examples, C classes. Undefined metrics, such as a correlation with a constant, are 0, so
that a collapsed model is never selected as the best one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def metric_of(name: str, labels: NDArray[Any], predicted: NDArray[Any]) -> Floats:
    """Compute a metric of each resample; labels, predicted: (B, R), class ids or values -> (B,).

    Names: accuracy; f1 (of the second of two labels, as in GLUE); macro_f1 (mean over the labels that occur or are
    predicted); matthews; pearson; spearman. Raises KeyError for any other name.
    """
    return _METRICS[name](np.asarray(labels), np.asarray(predicted))


def _accuracy(labels: NDArray[Any], predicted: NDArray[Any]) -> Floats:
    return np.asarray((labels == predicted).mean(-1), np.float64)


def _f1(labels: NDArray[Any], predicted: NDArray[Any]) -> Floats:
    return f1_by_class(confusion_of(labels, predicted))[:, 1]


def _macro_f1(labels: NDArray[Any], predicted: NDArray[Any]) -> Floats:
    confusion = confusion_of(labels, predicted)
    counted = confusion.sum(1) + confusion.sum(2) > 0
    return np.asarray(f1_by_class(confusion).sum(1) / counted.sum(1))


def _matthews(labels: NDArray[Any], predicted: NDArray[Any]) -> Floats:
    """Multi-class Matthews correlation (Gorodkin 2004, equation 8)."""
    confusion = confusion_of(labels, predicted)
    total, correct = confusion.sum((1, 2)), np.einsum("bcc->b", confusion)
    by_prediction, by_label = confusion.sum(1), confusion.sum(2)
    covariance = correct * total - (by_prediction * by_label).sum(1)
    # Not the root of the product, which is not exact in float64 for many examples.
    scale = np.sqrt(total**2 - (by_prediction**2).sum(1)) * np.sqrt(total**2 - (by_label**2).sum(1))
    return ratio(covariance, scale)


def _pearson(labels: NDArray[Any], predicted: NDArray[Any]) -> Floats:
    return _correlation(labels.astype(np.float64), predicted.astype(np.float64))


def _spearman(labels: NDArray[Any], predicted: NDArray[Any]) -> Floats:
    from scipy.stats import rankdata

    return _correlation(rankdata(labels, axis=-1), rankdata(predicted, axis=-1))


_METRICS: dict[str, Callable[[NDArray[Any], NDArray[Any]], Floats]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}


def confusion_of(labels: NDArray[Any], predicted: NDArray[Any], least: int = 2) -> Floats:
    """Return the confusion matrices, (B, C, C), labels by predictions, of at least `least` classes."""
    classes = max(int(max(labels.max(initial=0), predicted.max(initial=0))) + 1, least)
    cells = labels.astype(np.int64) * classes + predicted.astype(np.int64)
    counts = [np.bincount(row, minlength=classes * classes) for row in cells]
    return np.array(counts, np.float64).reshape(len(cells), classes, classes)


def f1_by_class(confusion: Floats) -> Floats:
    """Return F1 of each class, (B, C), given confusion matrices (B, C, C)."""
    correct = np.einsum("bcc->bc", confusion)
    return ratio(2 * correct, confusion.sum(1) + confusion.sum(2))


def _correlation(one: Floats, other: Floats) -> Floats:
    """Pearson's correlation; 0 if either argument is constant or not finite."""
    with np.errstate(invalid="ignore"):
        # Compares the range, since rounding errors can make the variance of constants nonzero.
        varies = (np.ptp(one, axis=-1) > 0) & (np.ptp(other, axis=-1) > 0)
        one, other = (values - values.mean(-1, keepdims=True) for values in (one, other))
        norms = (np.sqrt((values**2).sum(-1, keepdims=True)) for values in (one, other))
        one, other = (ratio(values, norm) for values, norm in zip((one, other), norms, strict=True))
        value = (one * other).sum(-1)
    return np.where(varies & np.isfinite(value), np.clip(value, -1.0, 1.0), 0.0)


def ratio(above: Floats, below: Floats) -> Floats:
    """Divide elementwise; 0 where the denominator is 0."""
    return np.asarray(np.divide(above, below, out=np.zeros_like(above), where=below > 0))

"""Paired bootstrap over examples and seeds, permutation test, and Holm's correction for multiple targets.

Shapes: S seeds, R examples, B resamples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion.tasks.metrics import metric_of

RESAMPLES = 2000
LEVEL = 0.95
_BATCH = 100  # resamples per batch
_SEED = 20_210_419  # fixed, so that reports are reproducible
_BOOTSTRAP: Any = {"n_resamples": RESAMPLES, "confidence_level": LEVEL, "method": "percentile", "rng": _SEED}
_TOLERANCE = 1e-12  # differences below it are ties

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Predictions:
    """Labels and predictions of one run on a split, (R,) each: class ids or values."""

    fingerprint: str
    labels: NDArray[Any]
    predicted: NDArray[Any]
    confidence: NDArray[np.float64] | None = None  # (R,) probability of each prediction, if stored
    errors: Sequence[dict[str, Any]] = ()  # the most confident errors, see `RowPredictions.confident_errors`

    @classmethod
    def of(cls, content: Any) -> Predictions | None:
        """Parse an entry of outcomes.json. Returns `None` if the labels or predictions are not numbers.

        Invalid confidences and errors are omitted.
        """
        try:
            labels, predicted = np.asarray(content["labels"]), np.asarray(content["predicted"])
            numbers = {labels.dtype.kind, predicted.dtype.kind} <= set("if")
            if labels.ndim != 1 or labels.shape != predicted.shape or not numbers:
                return None
        except (TypeError, KeyError, ValueError):
            return None
        confidence, errors = None, list[dict[str, Any]]()
        with contextlib.suppress(TypeError, KeyError, ValueError):
            values = np.asarray(content["confidence"], np.float64)
            confidence = values if values.shape == labels.shape and np.isfinite(values).all() else None
            errors = [
                {key: one[key] for key in ("row", "text", "label", "predicted", "confidence")}
                for one in content.get("errors", ())
                if isinstance(one["text"], list) and isinstance(one["confidence"], float)
            ]
        return cls(str(content["fingerprint"]), labels, predicted, confidence, errors)


@dataclass(frozen=True)
class Sample:
    """One run of a method: its seed, its metric value, and its predictions, if stored."""

    seed: int
    score: float
    predictions: Predictions | None = None


@dataclass(frozen=True)
class Difference:
    """Difference of the mean metric between a method and the baseline."""

    mean: float
    low: float | None = None  # 95 % confidence interval; None for single runs without predictions
    high: float | None = None
    p: float | None = None  # two-sided
    unit: str = ""  # unit of resampling, such as examples and seeds
    wins: int = 0  # numbers of seed pairs
    ties: int = 0
    losses: int = 0

    @property
    def pairs(self) -> int:
        """Number of seed pairs, or 0 if the comparison is unpaired."""
        return self.wins + self.ties + self.losses

    @property
    def conclusive(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def compare(method: Sequence[Sample], baseline: Sequence[Sample], metric: str, by_seed: bool = True) -> Difference:
    """Compare the runs of two methods on one split.

    Runs are paired by seed. If no seed is shared, or with `by_seed=False`, all runs are used and only the examples
    are paired. If predictions on the same examples are known for every run, examples and seed pairs are resampled
    jointly with replacement (Efron & Tibshirani 1993, ch. 8 and 15; for examples only: Koehn 2004); the interval is
    a percentile interval, and p is twice the fraction of resamples on the other side of zero. Otherwise the
    differences of the pairs are resampled, and p comes from a permutation test that swaps the members of each pair.
    """
    of_method, of_baseline = ({sample.seed: sample for sample in samples} for samples in (method, baseline))
    paired = sorted(of_method.keys() & of_baseline.keys()) if by_seed else []
    ones = [of_method[seed] for seed in paired] or list(method)
    others = [of_baseline[seed] for seed in paired] or list(baseline)
    scores, baselines = (np.array([one.score for one in samples]) for samples in (ones, others))
    differences = scores - baselines if paired else np.zeros(0)
    wins, losses = int((differences > _TOLERANCE).sum()), int((differences < -_TOLERANCE).sum())
    counts = (wins, len(differences) - wins - losses, losses)
    mean = float(scores.mean() - baselines.mean())
    kept = [one.predictions for one in (*ones, *others) if one.predictions is not None]
    rows = {(one.fingerprint, len(one.labels)) for one in kept}
    if len(kept) == len(ones) + len(others) and len(rows) == 1 and len(kept[0].labels) > 1:
        found = _bootstrap_rows(kept[: len(ones)], kept[len(ones) :], metric, bool(paired))
        unit = "examples and seeds" if len(ones) > 1 or len(others) > 1 else "examples"
        return Difference(mean, *found, unit, *counts)
    if len(differences) < 2:
        return Difference(mean, None, None, None, "", *counts)
    return Difference(mean, *_bootstrap_seeds(scores, baselines), "seeds", *counts)


def _bootstrap_rows(
    ones: Sequence[Predictions], others: Sequence[Predictions], metric: str, paired: bool
) -> tuple[float, float, float]:
    """Return low, high and p, resampled over examples and seeds."""
    from scipy import stats

    draw = np.random.RandomState(_SEED)

    def statistic(rows: NDArray[np.integer], axis: int = -1) -> Floats:
        """Compute the difference for resampled example indices: (B, R) -> (B,)."""
        seeds = draw.randint(len(ones), size=(len(rows), len(ones)))
        again = seeds if paired else draw.randint(len(others), size=(len(rows), len(others)))
        return _resampled_mean(ones, rows, seeds, metric) - _resampled_mean(others, rows, again, metric)

    rows = np.arange(len(ones[0].labels))
    found = stats.bootstrap((rows,), statistic, batch=_BATCH, vectorized=True, **_BOOTSTRAP)
    resampled = found.bootstrap_distribution
    tail = min((resampled <= _TOLERANCE).sum(), (resampled >= -_TOLERANCE).sum())
    p = min(1.0, 2 * (float(tail) + 1) / (len(resampled) + 1))
    return float(found.confidence_interval.low), float(found.confidence_interval.high), p


def _bootstrap_seeds(scores: Floats, baselines: Floats) -> tuple[float, float, float]:
    """Return low, high and p, resampled over seed pairs."""
    from scipy import stats

    differences = scores - baselines
    low = high = float(differences[0])
    if np.ptp(differences) >= _TOLERANCE:  # scipy warns if all values are equal
        interval = stats.bootstrap((differences,), np.mean, **_BOOTSTRAP).confidence_interval
        low, high = float(interval.low), float(interval.high)
    test = stats.permutation_test(
        (scores, baselines),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=_SEED,
    )
    return low, high, float(test.pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Adjust the p-values of a family of tests with the step-down method of Holm (1979)."""
    order = np.argsort(values, kind="stable")
    steps = np.minimum(1.0, np.arange(len(values), 0, -1) * np.asarray(values, float)[order])
    adjusted = np.empty(len(values))
    adjusted[order] = np.maximum.accumulate(steps)
    return [float(value) for value in adjusted]


def constant_scores(labels: NDArray[Any], metrics: Sequence[str]) -> tuple[str, dict[str, float]]:
    """Return the name and the metrics of predicting the most frequent label; no metrics for the mean in regression."""
    if not len(labels):
        return "", {}
    if labels.dtype.kind == "f":
        return "mean", {}
    values, counts = np.unique(labels, return_counts=True)
    constant = np.full_like(labels, values[counts.argmax()])
    scores = {}
    for metric in metrics:
        if metric not in ("pearson", "spearman"):
            with contextlib.suppress(KeyError):
                scores[metric] = float(metric_of(metric, labels[None], constant[None])[0])
    return "majority class", scores


def _resampled_mean(
    runs: Sequence[Predictions], rows: NDArray[np.integer], seeds: NDArray[np.integer], metric: str
) -> Floats:
    """Compute the mean metric of each resample of examples (B, R) and runs (B, S) -> (B,)."""
    scores = np.stack([metric_of(metric, run.labels[rows], run.predicted[rows]) for run in runs], -1)
    return np.asarray(np.take_along_axis(scores, seeds, axis=-1).mean(-1))

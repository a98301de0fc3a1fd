"""Is a difference real? Paired bootstrap over rows and seeds, and Holm's correction for many targets.

Shapes: S seeds, R rows, B resamples.
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
_BATCH = 100  # resamples at a time
_SEED = 20_210_419  # the same report from the same files
_AGAINST_TIES = 1e-12

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Answers:
    """What one run said of the rows of a split; labels, predicted: (R,), class ids or values."""

    fingerprint: str
    labels: NDArray[Any]
    predicted: NDArray[Any]


@dataclass(frozen=True)
class Sample:
    """One run of a method: its seed, its score, and what it said row by row, where that was kept."""

    seed: int
    score: float
    answers: Answers | None = None


@dataclass(frozen=True)
class Difference:
    """A method's score less the baseline's, over the pairs of runs with the same seed.

    mean: of the scores. low, high: 95 % interval; None: one run each, and nothing row by row.
    p: two-sided. unit: what was resampled. wins, ties, losses: pairs.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    unit: str
    wins: int
    ties: int
    losses: int

    @property
    def pairs(self) -> int:
        """How many pairs of runs with the same seed were compared; 0: all runs of both were, unpaired."""
        return self.wins + self.ties + self.losses

    @property
    def conclusive(self) -> bool:
        """Whether there is an interval and it excludes zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def compare(
    method: Sequence[Sample], baseline: Sequence[Sample], metric: str, by_seed: bool = True
) -> Difference:
    """The difference of two methods' runs on one split.

    Runs are paired by their seeds, unless `by_seed` says that a seed means nothing to both; where no seed is in both,
    or means nothing, all are taken and only the rows are paired. Where the
    answers of every run to the same rows are known, rows and pairs of seeds are drawn together, with replacement
    (Efron & Tibshirani 1993, ch. 8 and 15; for rows alone: Koehn 2004); the interval is of percentiles and p is twice
    the share of resamples on the other side of zero. Else the pairs' differences are drawn, and p is of the
    permutation test that swaps the members of pairs.
    """
    from scipy import stats

    ones, others, paired = _pairs(method, baseline, by_seed)
    mean = _mean(ones) - _mean(others)
    differences = (
        np.array([one.score - other.score for one, other in zip(ones, others, strict=True)])
        if paired
        else np.zeros(0)
    )
    wins, losses = int((differences > _AGAINST_TIES).sum()), int((differences < -_AGAINST_TIES).sum())
    counts = (wins, len(differences) - wins - losses, losses)
    answers = _same_rows([*ones, *others])
    if answers is not None:
        mine, its = answers[: len(ones)], answers[len(ones) :]
        draw = np.random.RandomState(_SEED)

        def statistic(rows: NDArray[np.integer], axis: int = -1) -> Floats:
            """rows: (B, R) -> (B,)."""
            drawn = draw.randint(len(mine), size=(len(rows), len(mine)))
            again = drawn if paired else draw.randint(len(its), size=(len(rows), len(its)))
            return _drawn_mean(mine, rows, drawn, metric) - _drawn_mean(its, rows, again, metric)

        found = stats.bootstrap(
            (np.arange(len(mine[0].labels)),),
            statistic,
            n_resamples=RESAMPLES,
            batch=_BATCH,
            vectorized=True,
            confidence_level=LEVEL,
            method="percentile",
            **_generator(stats.bootstrap),
        )
        distribution = found.bootstrap_distribution
        tail = min((distribution <= _AGAINST_TIES).sum(), (distribution >= -_AGAINST_TIES).sum())
        p = min(1.0, 2 * (float(tail) + 1) / (len(distribution) + 1))
        several = len(ones) > 1 or len(others) > 1
        unit = "rows and seeds" if several else "rows"
        return Difference(
            mean,
            float(found.confidence_interval.low),
            float(found.confidence_interval.high),
            p,
            unit,
            *counts,
        )
    if len(differences) < 2:
        return Difference(mean, None, None, None, "", *counts)
    if np.ptp(differences) < _AGAINST_TIES:  # scipy warns of what has no spread
        low = high = float(differences[0])
    else:
        interval = stats.bootstrap(
            (differences,),
            np.mean,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method="percentile",
            **_generator(stats.bootstrap),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    test = stats.permutation_test(
        (np.array([one.score for one in ones]), np.array([other.score for other in others])),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        **_generator(stats.permutation_test),
    )
    return Difference(mean, low, high, float(test.pvalue), "seeds", *counts)


def holm(values: Sequence[float]) -> list[float]:
    """p-values of a family of tests, adjusted step by step from the smallest (Holm 1979)."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted


def constant_scores(labels: NDArray[Any], metrics: Sequence[str]) -> tuple[str, dict[str, float]]:
    """What one answer for every row scores, the lower bound of any method: what it is, and the scores by metric.

    The answer is the most frequent label, of values the mean; correlations with a constant are not defined, so left
    out, and so is a metric that is not known here.
    """
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


def _drawn_mean(
    runs: Sequence[Answers], rows: NDArray[np.integer], drawn: NDArray[np.integer], metric: str
) -> Floats:
    """The mean score of the drawn runs on the drawn rows: rows (B, R), drawn (B, S) -> (B,)."""
    scores = np.stack([metric_of(metric, run.labels[rows], run.predicted[rows]) for run in runs], -1)
    return np.asarray(np.take_along_axis(scores, drawn, axis=-1).mean(-1))


def _pairs(
    method: Sequence[Sample], baseline: Sequence[Sample], by_seed: bool
) -> tuple[list[Sample], list[Sample], bool]:
    """The runs of both, in pairs where they share seeds."""
    ones, others = ({sample.seed: sample for sample in samples} for samples in (method, baseline))
    if by_seed and (common := sorted(ones.keys() & others.keys())):
        return [ones[seed] for seed in common], [others[seed] for seed in common], True
    return list(method), list(baseline), False


def _same_rows(samples: Sequence[Sample]) -> list[Answers] | None:
    """The answers of all, if they are to the same rows."""
    answers = [sample.answers for sample in samples if sample.answers is not None]
    same = len(answers) == len(samples) and len({one.fingerprint for one in answers}) == 1
    same = same and len({len(one.labels) for one in answers}) == 1 and len(answers[0].labels) > 1
    return answers if same else None


def _mean(samples: Sequence[Sample]) -> float:
    return float(np.mean([sample.score for sample in samples]))


def _generator(function: Any) -> dict[str, Any]:
    """A fixed seed, by the name that this release of scipy has for it."""
    import inspect

    name = "rng" if "rng" in inspect.signature(function).parameters else "random_state"
    return {name: np.random.default_rng(_SEED)}

"""What a stored fusion loses without some of its sources, nothing being trained again.

Shapes: N sources.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

Scorer = Callable[[Sequence[int]], "Scored"]
"""Scores the fusion with the sources at these positions alone."""


@dataclass(frozen=True)
class Scored:
    """metrics: by name, the first is what counts. loss: the mean over the rows, which tells apart what scores alike.

    predicted: the prediction for each row, where it is kept.
    """

    metrics: dict[str, float]
    loss: float
    predicted: Sequence[Any] | None = None

    @property
    def key(self) -> tuple[float, float]:
        return next(iter(self.metrics.values())), -self.loss

    def __str__(self) -> str:
        return "  ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())

    def plain(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "loss": self.loss}


@dataclass(frozen=True)
class Step:
    """A point of the pruning curve: which sources are left, by position, and what they score."""

    kept: tuple[int, ...]
    scored: Scored


def without_each(count: int, score: Scorer) -> list[Scored]:
    """The scores without source 0, without source 1, ... of N."""
    return [score([n for n in range(count) if n != left_out]) for left_out in range(count)]


def prune_greedily(count: int, score: Scorer, full: Scored, first: Sequence[Scored]) -> list[Step]:
    """From all sources down to one: each step leaves out the source whose going costs least.

    Of sources that cost the same score the one goes that leaves the lower loss, then the last.

    Args:
        full: with all sources.
        first: what `without_each` gave, so that the first step is known.

    Returns:
        N steps, the first with all sources. N(N − 1)/2 − 1 further scores are asked for.
    """
    steps = [Step(tuple(range(count)), full)]
    while len(kept := steps[-1].kept) > 1:
        choices = [tuple(n for n in kept if n != left_out) for left_out in kept]
        scores = first if len(kept) == count else [score(choice) for choice in choices]
        best = max(range(len(choices)), key=lambda n: (scores[n].key, n))
        steps.append(Step(choices[best], scores[best]))
        log.info("%d of %d sources: %s", len(choices[best]), count, scores[best])
    return steps


def prune_in_order(count: int, score: Scorer, full: Scored, first: Sequence[Scored]) -> list[Step]:
    """As `prune_greedily`, but all are left out in the order of what `without_each` gave.

    Returns:
        N steps. Only N − 2 further scores are asked for, which with many sources is what can be waited for.
    """
    order = sorted(range(count), key=lambda n: (first[n].key, n), reverse=True)
    steps = [Step(tuple(range(count)), full)]
    for left_out in order[: count - 1]:
        kept = tuple(n for n in steps[-1].kept if n != left_out)
        steps.append(Step(kept, first[left_out] if len(kept) == count - 1 else score(kept)))
        log.info("%d of %d sources: %s", len(kept), count, steps[-1].scored)
    return steps

"""Source ablation and pruning of a stored fusion, without further training.

Shapes: N sources.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The scores of a fusion with some of its sources.

    Attributes:
        metrics: by name; the first one decides.
        loss: the mean over the rows; decides between equal metrics.
    """

    metrics: dict[str, float]
    loss: float
    predictions: Sequence[Any] = ()

    @property
    def key(self) -> tuple[float, float]:
        """Sorts evaluations from worst to best."""
        return next(iter(self.metrics.values())), -self.loss

    def as_json(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "loss": self.loss}

    def __str__(self) -> str:
        return "  ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())


Evaluate = Callable[[Sequence[int]], Evaluation]
"""Evaluates the fusion with only the sources at these positions."""


def ablate_each(count: int, evaluate: Evaluate) -> list[Evaluation]:
    """The evaluations without source 0, without source 1, ... of N."""
    return [evaluate([n for n in range(count) if n != removed]) for removed in range(count)]


def prune(
    full: Evaluation, ablated: Sequence[Evaluation], evaluate: Evaluate, greedy: bool
) -> list[tuple[tuple[int, ...], Evaluation]]:
    """Remove the least important source until one is left; of equally important ones, the last.

    Args:
        full: with all sources.
        ablated: from `ablate_each`.
        greedy: evaluate the removal of each remaining source at every step, N(N - 1)/2 - 1 more evaluations. Otherwise
            the order is that of `ablated`, with N - 2 more.

    Returns:
        N steps: the positions of the remaining sources, and their evaluation.
    """
    remaining = tuple(range(len(ablated)))
    steps = [(remaining, full)]
    without = dict(enumerate(ablated))
    while len(remaining) > 1:
        if greedy and len(steps) > 1:
            without = {n: evaluate([other for other in remaining if other != n]) for n in remaining}
        removed = max(remaining, key=lambda n: (without[n].key, n))
        remaining = tuple(n for n in remaining if n != removed)
        known = greedy or len(steps) == 1
        steps.append((remaining, without[removed] if known else evaluate(remaining)))
        log.info("%d of %d sources: %s", len(remaining), len(ablated), steps[-1][1])
    return steps

"""From the rounds of a run to figures: medians, spreads, ratios, and what may be said of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

REACHED, NOT_REACHED = "reached", "not reached"
TOO_NOISY, TOO_FEW = "too noisy: no verdict", "one round: no verdict"


def spread(values: Sequence[float]) -> float:
    """Distance of the quartiles, as a part of the median."""
    low, high = np.quantile(values, (0.25, 0.75))
    return float(high - low) / statistics.median(values)


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Round by round, so that what slows down a whole round drops out."""
    return [one / other for one, other in zip(numerators, denominators, strict=True)]


@dataclass(frozen=True)
class Target:
    """What a ratio should come to."""

    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    what: says it in words. values: of each round. target: None where it is for information.
    exact: a count, which a single measurement gives (bytes), and no time.
    unit: "x" for a ratio, "%" for one that is shown as what it adds, "s" for seconds.
    """

    what: str
    values: tuple[float, ...]
    target: Target | None = None
    exact: bool = False
    unit: str = "x"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def noise_allowed(self, noise_limit: float) -> float:
        """A ratio of 1.03 at most cannot be judged by rounds that differ by a tenth."""
        if self.target is None or self.unit == "s" or self.target.limit == 1.0:
            return noise_limit
        return min(noise_limit, abs(self.target.limit - 1.0))

    def verdict(self, noise_limit: float) -> str:
        """Empty for information; never reached or not reached where the rounds differ too much."""
        if self.target is None:
            return ""
        if not self.exact:
            if len(self.values) < 2:
                return TOO_FEW
            if spread(self.values) > self.noise_allowed(noise_limit):
                return TOO_NOISY
        return REACHED if self.target.met(self.median) else NOT_REACHED

    def shown(self, value: float) -> str:
        if self.unit == "%":
            return f"{100 * (value - 1):+.1f} %"
        return f"{value:.2f}{' s' if self.unit == 's' else 'x'}"

    def shown_target(self) -> str:
        if self.target is None:
            return ""
        sign, _, _ = str(self.target).partition(" ")
        return f"{sign} {self.shown(self.target.limit)}"

    def as_json(self, noise_limit: float) -> dict[str, Any]:
        return {
            "what": self.what,
            "unit": "ratio" if self.unit == "%" else {"x": "ratio", "s": "seconds"}[self.unit],
            "median": self.median,
            "low": min(self.values),
            "high": max(self.values),
            "spread": spread(self.values),
            "rounds": list(self.values),
            "to_reach": None if self.target is None else str(self.target),
            "verdict": self.verdict(noise_limit) or None,
        }


def ratio(
    what: str,
    numerators: Sequence[float],
    denominators: Sequence[float],
    target: Target | None = None,
    exact: bool = False,
    unit: str = "x",
) -> Figure:
    """A figure that compares two things, round by round."""
    return Figure(what, tuple(ratios(numerators, denominators)), target, exact, unit)

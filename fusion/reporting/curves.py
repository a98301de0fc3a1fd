"""How the trainings went: what they noted at each step, put together where a run was interrupted, over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusion.reporting.reading import Found
from fusion.reporting.results import Target, Trained

POINTS = 200  # of a line; a longer one is thinned

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Curve:
    """A method's metric over the steps: mean, lowest and highest of its seeds. All (points,)."""

    method: str
    steps: Floats
    mean: Floats
    low: Floats
    high: Floats
    seeds: int


def curves_of(target: Target, found: Found) -> dict[str, list[Curve]]:
    """By metric (`train/loss`, `validation/accuracy`, ...) the curves of the methods that noted it."""
    found_curves: dict[str, list[Curve]] = {}
    for method, group in target.groups.items():
        if method.endswith(" alone"):
            continue  # a training on another task
        histories = [history for trained in group.trained if (history := history_of(trained, found))]
        for metric in dict.fromkeys(name for history in histories for name in history):
            series = [history[metric] for history in histories if metric in history]
            if (curve := _curve(method, series)) is not None:
                found_curves.setdefault(metric, []).append(curve)
    return found_curves


def history_of(trained: Trained, found: Found) -> dict[str, dict[int, float]]:
    """By metric its value at each step. A run that was taken up again has left a part in each of its folders."""
    history: dict[str, dict[int, float]] = {}
    for line in found.history(trained.run.folder):
        step = line.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            continue
        for name, value in line.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)
            if "/" in name and number:
                history.setdefault(name, {})[step] = float(value)
    return history


def _curve(method: str, series: Sequence[Mapping[int, float]]) -> Curve | None:
    steps = sorted(set.intersection(*(set(one) for one in series))) if series else []
    if not steps:
        return None
    if len(steps) > POINTS:
        steps = [steps[round(n * (len(steps) - 1) / (POINTS - 1))] for n in range(POINTS)]
    values = np.array([[one[step] for step in steps] for one in series])
    return Curve(method, np.array(steps, float), values.mean(0), values.min(0), values.max(0), len(series))

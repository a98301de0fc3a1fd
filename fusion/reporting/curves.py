"""Training curves: the recorded history of each run, joined over its interrupted parts, over the seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fusion.reporting.reading import Found
from fusion.reporting.scores import Trained
from fusion.reporting.targets import Target

if TYPE_CHECKING:
    from pandas import DataFrame

POINTS = 200  # of a curve; a longer one is thinned


def curves_of(target: Target, found: Found) -> dict[str, dict[str, DataFrame]]:
    """By metric (`train/loss`, `validation/accuracy`, ...) and method, a curve over the steps.

    A curve is a frame with the index `step` and the columns mean, min, max and count, over the seeds.
    """
    import pandas as pd

    curves: dict[str, dict[str, DataFrame]] = {}
    for method, group in target.groups.items():
        if method.endswith(" alone"):
            continue  # trained on another task
        histories = [history_of(trained, found) for trained in group.trained]
        for metric in dict.fromkeys(name for history in histories for name in history.columns):
            seeds = [history[metric].dropna() for history in histories if metric in history]
            points = pd.concat(seeds, axis=1, join="inner").sort_index()
            if len(points) > POINTS:
                points = points.iloc[np.linspace(0, len(points) - 1, POINTS).round().astype(int)]
            if len(points):
                curves.setdefault(metric, {})[method] = points.agg(["mean", "min", "max", "count"], axis=1)
    return curves


def shown_curves(target: Target, found: Found) -> dict[str, dict[str, DataFrame]]:
    """What the page shows: each term of the loss, and the metric that selects the best epoch."""
    every = curves_of(target, found)
    terms = [name for name in every if name.startswith("train/") and name.endswith("loss")]
    if "train/loss" in terms and "train/task_loss" in terms and len(terms) == 2:
        terms.remove("train/task_loss")  # the only term is the loss
    scores = [name for name in every if not name.startswith("train/") and name.endswith(f"/{target.metric}")]
    return {name: every[name] for name in [*sorted(terms), *scores[:1]]}


def history_of(trained: Trained, found: Found) -> DataFrame:
    """The finite metrics of a training, by step; the last part of a resumed run counts where parts overlap."""
    import pandas as pd

    values: dict[str, dict[int, float]] = {}
    for line in found.history(trained.run.folder):
        if type(step := line.get("step")) is int:
            for name, value in line.items():
                if "/" in name and type(value) in (int, float) and np.isfinite(value):
                    values.setdefault(name, {})[step] = float(value)
    return pd.DataFrame(values)

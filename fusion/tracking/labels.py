"""What a run is called where runs are looked at, and its config as columns to filter by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fusion.config.methods import ADAPTER
from fusion.config.stages import StageConfig
from fusion.tasks.table import METRICS

NAMES_SHOWN = 4  # of sources
LENGTH = 128  # of a name, W&B's limit
SCORES = {*(metric for metrics in METRICS.values() for metric in metrics), "mean"}


def stage_name(config: StageConfig, sources: Sequence[str] = ()) -> str:
    """`cb · adapter · seed 3`; of a fusion `cb ← snli+mrpc+rte · seed 3`.

    What the artifact's own name says beyond its task and method (what a sweep changes, a name of the user's) stands
    at the end, and so does the composition unless it is AdapterFusion.

    Args:
        sources: of a fusion, in order.
    """
    tasks = "+".join(str(task.name) for task in config.task_list)
    composition = getattr(config, "composition", None)
    if composition is not None:
        parts = [f"{tasks} ← {_listed(sources)}"]
        parts += [] if composition.is_default else [composition.name]
    else:
        adapter = config.adapter.name  # type: ignore[attr-defined]
        method = config.method  # type: ignore[attr-defined]
        shown = f" {adapter}" if method.definition.kind == ADAPTER and adapter != "pfeiffer" else ""
        parts = [tasks, f"{method.name}{shown}"]
    parts.append(f"seed {config.seed}")
    usual = config.default_name()  # type: ignore[attr-defined]
    own = str(config.name)
    own = "" if own == usual else own.removeprefix(f"{usual}-")
    own = re.sub(rf"(^|-)seed-{config.seed}(?=-|$)", "", own).strip("-")
    return " · ".join([*parts, *([own] if own else [])])[:LENGTH]


def _listed(names: Sequence[str]) -> str:
    shown = "+".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown}+{len(names) - NAMES_SHOWN} more"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"optim": {"lr": 1e-4}}` -> ("optim/lr", 1e-4): a column of its own for each value.

    With a stroke and not a dot, which W&B advises against in keys. What is None or empty is left out.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        elif isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            for number, entry in enumerate(value):
                yield from flat(entry, f"{prefix}{key}/{number}/")
        elif value is not None:
            yield f"{prefix}{key}", value


def best_is(metric: str) -> str | None:
    """Which of a curve's values is the best: "min" of a loss, "max" of a score; None of anything else.

    All scores of the task files are the better the higher, a regression's too: they are correlations.
    """
    last = metric.rsplit("/", 1)[-1]
    if last == "loss" or last.endswith("_loss"):
        return "min"
    return "max" if last in SCORES else None

"""Labels of a run: its display name, its config as flat columns, and the direction of its metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fusion.config.methods import ADAPTER
from fusion.config.stages import StageConfig
from fusion.tasks.table import METRICS

NAMES_SHOWN = 4  # sources in a name
LENGTH = 128  # W&B's limit for a name
SCORES = {*(metric for metrics in METRICS.values() for metric in metrics), "mean"}


def stage_name(config: StageConfig, sources: Sequence[str] = ()) -> str:
    """`cb · adapter · seed 3`; of a fusion `cb ← snli+mrpc+rte · seed 3`.

    A composition other than AdapterFusion is added, and at the end what the artifact's name has beyond task and
    method: the swept values, or a name set by the user.

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
    """`{"optim": {"lr": 1e-4}}` -> ("optim/lr", 1e-4): one column for each value. None is omitted.

    The separator is a slash: W&B advises against dots in keys.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        elif isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            for number, entry in enumerate(value):
                yield from flat(entry, f"{prefix}{key}/{number}/")
        elif value is not None:
            yield f"{prefix}{key}", value


def plain(value: Any) -> Any:
    """Plain containers and scalars for W&B; anything else, NaN and infinity included, becomes text."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def best_is(metric: str) -> str | None:
    """The best value of a curve: "min" of a loss, "max" of a score, None of anything else.

    Every score is better the higher it is; those of regressions are correlations.
    """
    last = metric.rsplit("/", 1)[-1]
    if last == "loss" or last.endswith("_loss"):
        return "min"
    return "max" if last in SCORES else None

"""What the page and the files beside it are made of."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusion.reporting.attention import Attention, attention_of
from fusion.reporting.curves import Curve, curves_of
from fusion.reporting.reading import Found
from fusion.reporting.results import Target, Trained
from fusion.reporting.statistics import Answers, Difference, Sample, compare
from fusion.reporting.wording import chosen_setting, titled


@dataclass
class Contents:
    """What the page and the files beside it are made of.

    targets: those with several methods, or all if there are none. single: the others, such as the tasks that the
    sources come from.
    """

    found: Found
    targets: list[Target]
    single: list[Target]
    attention: list[Attention]
    notes: list[str] = field(default_factory=list)

    @property
    def everything(self) -> list[Target]:
        return [*self.targets, *self.single]

    @functools.cached_property
    def curves(self) -> list[tuple[Target, dict[str, list[Curve]]]]:
        """Of each target that has some, what is drawn; read from the histories once."""
        every = [(target, shown_curves(target, self.found)) for target in self.everything]
        return [(target, curves) for target, curves in every if curves]

    @property
    def inspected(self) -> list[tuple[Target, str, Trained, dict[str, Any]]]:
        """Of each method of each target the first run that was looked into."""
        seen = []
        for target in self.everything:
            for method, group in target.groups.items():
                for trained in group.trained:
                    inspection = self.found.inspections.get(trained.hash or "")
                    if inspection is not None and _is_whole(inspection):
                        seen.append((target, method, trained, inspection))
                        break
        return seen


def contents_of(found: Found, targets: list[Target], notes: Sequence[str] = ()) -> Contents:
    several = [target for target in targets if len(target.every_group) > 1] or targets
    single = [target for target in targets if target not in several]
    return Contents(found, several, single, attention_of([*several, *single], found), list(notes))


def shown_curves(target: Target, found: Found) -> dict[str, list[Curve]]:
    """What is drawn: each term of the loss, and the metric that picks the best epoch."""
    every = curves_of(target, found)
    terms = [name for name in every if name.startswith("train/") and name.endswith("loss")]
    if "train/loss" in terms and "train/task_loss" in terms and len(terms) == 2:
        terms.remove("train/task_loss")  # the only term is the loss
    scores = [name for name in every if not name.startswith("train/") and name.endswith(f"/{target.metric}")]
    return {name: every[name] for name in [*sorted(terms), *scores[:1]]}


def chosen_settings(target: Target, methods: Iterable[str]) -> list[str]:
    """Of those methods that have several settings, which one a figure shows."""
    groups = [target.groups[method] for method in dict.fromkeys(methods) if method in target.groups]
    return [f"{group.method}: {setting}" for group in groups if (setting := chosen_setting(group))]


def costs(target: Target) -> list[dict[str, Any]]:
    rows = []
    for group in target.every_group:
        if group.method.endswith(" alone"):
            continue  # it learnt nothing from the target
        results = [trained.run.result for trained in group.trained]
        rows.append(
            {
                "method": titled(group),
                "score": group.mean,
                "parameters": _mean_of(results, "parameters", "trainable"),
                "bytes": _mean_of(results, "parameters", "stored_bytes"),
                "seconds": _mean_of(results, "speed", "seconds"),
                "tokens": _mean_of(results, "speed", "tokens_per_second"),
                "memory": _mean_of(results, "speed", "peak_memory_bytes"),
                "energy": _mean_of(results, "speed", "energy_joules"),
            }
        )
    return rows


def ablation(inspection: Mapping[str, Any], metric: str) -> dict[str, Difference]:
    """By source, the score without it less the score with all: with an interval over the rows, where they were kept."""
    full = inspection["metrics"][metric]
    kept = _answers_of(inspection, inspection.get("predicted"))
    made = {}
    for source, one in inspection["masked"].items():
        score, answers = one["metrics"][metric], _answers_of(inspection, one.get("predicted"))
        if kept is None or answers is None:
            made[source] = Difference(score - full, None, None, None, "", 0, 0, 0)
        else:
            made[source] = compare([Sample(0, score, answers)], [Sample(0, full, kept)], metric)
    return made


def _answers_of(inspection: Mapping[str, Any], predicted: Any) -> Answers | None:
    try:
        labels, values = np.asarray(inspection["labels"]), np.asarray(predicted)
    except (KeyError, ValueError):  # an inspection of before they were kept
        return None
    numbers = {labels.dtype.kind, values.dtype.kind} <= set("if")
    if labels.ndim != 1 or labels.shape != values.shape or not numbers:
        return None
    return Answers(str(inspection.get("fingerprint")), labels, values)


def _mean_of(results: Sequence[Mapping[str, Any]], part: str, key: str) -> float | None:
    values = [(result.get(part) or {}).get(key) for result in results]
    numbers = [float(value) for value in values if isinstance(value, (int, float))]
    return float(np.mean(numbers)) if numbers else None


def _is_whole(inspection: Mapping[str, Any]) -> bool:
    """Whether all that the page takes from an inspection is there; a file may be of anybody's."""
    try:
        metric = next(iter(inspection["metrics"]))
        numbers = [
            inspection["metrics"][metric],
            *(one["metrics"][metric] for one in inspection["masked"].values()),
        ]
        numbers += [step["metrics"][metric] for step in inspection["pruned"] or []]
        rows = all(
            {"row", "tokens", "special", "weights", "predicted", "truth", "right"} <= set(r)
            for r in inspection["words"]
        )
        return (
            rows
            and all(isinstance(number, (int, float)) for number in numbers)
            and {"sources", "slots", "split", "rows"} <= set(inspection)
        )
    except (KeyError, TypeError, AttributeError, StopIteration):
        return False

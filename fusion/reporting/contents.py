"""The contents of the page and of the files beside it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fusion.reporting.ablation import is_complete
from fusion.reporting.attention import Attention, attention_of
from fusion.reporting.curves import shown_curves
from fusion.reporting.reading import Found
from fusion.reporting.results import Target, order_of
from fusion.reporting.trained import Trained
from fusion.reporting.wording import titled

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass
class Contents:
    """targets: those with several methods, or all if there are none. single: the others, such as source tasks."""

    found: Found
    targets: list[Target]
    single: list[Target]
    attention: list[Attention]
    notes: list[str] = field(default_factory=list)

    @property
    def everything(self) -> list[Target]:
        return [*self.targets, *self.single]

    @functools.cached_property
    def curves(self) -> list[tuple[Target, dict[str, dict[str, DataFrame]]]]:
        """The curves of each target that has some; the histories are read once."""
        every = [(target, shown_curves(target, self.found)) for target in self.everything]
        return [(target, curves) for target, curves in every if curves]

    @functools.cached_property
    def inspected(self) -> list[tuple[Target, str, Trained, dict[str, Any]]]:
        """The first inspected run of each method of each target."""
        seen = []
        for target in self.everything:
            for method, group in target.groups.items():
                for trained in group.trained:
                    inspection = self.found.inspections.get(trained.hash or "")
                    if inspection is not None and is_complete(inspection):
                        seen.append((target, method, trained, inspection))
                        break
        return seen


def contents_of(found: Found, targets: list[Target], notes: Sequence[str] = ()) -> Contents:
    several = [target for target in targets if len(target.every_group) > 1] or targets
    single = [target for target in targets if target not in several]
    return Contents(found, several, single, attention_of([*several, *single], found), list(notes))


def every_method(targets: Sequence[Target]) -> list[str]:
    """All methods of all targets, in one order."""
    return sorted({method for target in targets for method in target.groups}, key=order_of)


_COSTS = {
    "parameters": ("parameters", "trainable"),
    "bytes": ("parameters", "stored_bytes"),
    "seconds": ("speed", "seconds"),
    "tokens": ("speed", "tokens_per_second"),
    "memory": ("speed", "peak_memory_bytes"),
    "energy": ("speed", "energy_joules"),
}


def costs(target: Target) -> list[dict[str, Any]]:
    """The score and mean cost of each group that was trained on the target."""
    rows = []
    for group in target.every_group:
        if not group.method.endswith(" alone"):
            results = [trained.run.result for trained in group.trained]
            means = {key: _mean(results, *path) for key, path in _COSTS.items()}
            rows.append({"method": titled(group), "score": group.mean, **means})
    return rows


def _mean(results: Sequence[Mapping[str, Any]], part: str, key: str) -> float | None:
    values = [(result.get(part) or {}).get(key) for result in results]
    numbers = [float(value) for value in values if isinstance(value, (int, float))]
    return sum(numbers) / len(numbers) if numbers else None

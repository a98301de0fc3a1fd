"""Results by target and method: the groups of seeds of each method, and their differences to the baseline."""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass, field
from typing import Any

from fusion.reporting.scores import Score, Trained
from fusion.reporting.statistics import LEVEL, Difference
from fusion.store.settings_groups import key_of

BASELINE = "single adapter"
FUSION = "fusion"
_ORDER = ("head", "full fine-tuning", "LoRA", "BitFit", BASELINE, "alone", FUSION)
BUDGET = ("optim.", "trainer.", "data.", "loss.")  # prefixes of the settings that a training may spend


@dataclass
class Group:
    """The runs of one method with one setting on one target: they differ in their seeds.

    differing: the settings in which the method's groups differ. others: the number of other groups of the method.
    chosen_on: the split whose scores select one of them. against: the baseline's group it is compared with.
    difference: to that one. adjusted: its p-value after Holm. unequal: the differences in budget; if there are some,
    the difference does not compare the methods alone.
    """

    method: str
    entries: list[Score]
    metric: str
    differing: str = ""
    others: int = 0
    chosen_on: str = "validation"
    against: Group | None = None
    difference: Difference | None = None
    adjusted: float | None = None
    unequal: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return key_of(self.entries[0].variant)

    @property
    def anywhere(self) -> bool:
        return any(entry.anywhere for entry in self.entries)

    @functools.cached_property
    def budget(self) -> dict[str, Any]:
        """The budget of the training, by setting; empty if nothing was trained on the target."""
        variant = {} if self.anywhere else self.entries[0].variant
        return {key: value for key, value in variant.items() if key.startswith(BUDGET)}

    @property
    def seeds(self) -> int:
        return len({entry.seed for entry in self.entries})

    @property
    def fingerprints(self) -> dict[str, int]:
        """The number of rows by the fingerprint of the rows that were scored, where it is known."""
        kept = [entry.predictions for entry in self.entries if entry.predictions is not None]
        return {one.fingerprint: len(one.labels) for one in kept}

    def scores_by(self, metric: str) -> list[float]:
        return [entry.metrics[metric] for entry in self.entries if metric in entry.metrics]

    @property
    def scores(self) -> list[float]:
        return self.scores_by(self.metric)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def trained(self) -> list[Trained]:
        return [entry.trained for entry in self.entries if entry.trained is not None]

    @property
    def verdict(self) -> str:
        """better, worse or same (no difference shown) after Holm's correction; unequal: budgets differ; "": not tested."""
        if self.difference is None:
            return ""
        if self.unequal or self.adjusted is None:
            return "unequal" if self.unequal else ""
        if self.adjusted > 1 - LEVEL:
            return "same"
        return "better" if self.difference.mean > 0 else "worse"


@dataclass
class Target:
    """A target task in one setting.

    groups: the best group of each method on validation; variants: all groups of each method. constant: by metric, the
    score of predicting the split's majority class (or mean) for every row; empty if unknown.
    """

    label: str
    task: str
    split: str
    metric: str
    rows: int | None
    groups: dict[str, Group]
    variants: dict[str, list[Group]]
    constant: dict[str, float] = field(default_factory=dict)
    majority: str = ""

    @property
    def every_group(self) -> list[Group]:
        return [group for groups in self.variants.values() for group in groups]

    @property
    def selected_here(self) -> list[str]:
        """What was selected by scores on the shown rows, which makes these scores optimistic."""
        selected = []
        for entry in (entry for group in self.every_group for entry in group.entries if not entry.anywhere):
            result = {} if entry.trained is None else entry.trained.run.result
            scored = {key.rpartition("/")[2] for key in result.get("metrics") or {}}
            if self.split in scored and result.get("best_epoch") is not None and result.get("epochs") != 1:
                selected.append("the best epoch")
                break
        if any(group.others and self.split.startswith(group.chosen_on) for group in self.groups.values()):
            selected.append("the best setting of a method")
        return selected

    @property
    def metrics(self) -> list[str]:
        """Every metric of its results, the main one first."""
        names = (name for group in self.every_group for entry in group.entries for name in entry.metrics)
        return list(dict.fromkeys([self.metric, *names]))


def order_of(method: str) -> tuple[int, str]:
    """The order of methods in tables."""
    if method.endswith(" alone"):
        return _ORDER.index("alone"), method
    matches = (n for n, name in enumerate(_ORDER) if method == name or method.startswith(f"{name} "))
    return next(matches, len(_ORDER)), method


def text(value: Any) -> str:
    """A setting's value."""
    return "null" if value is None else "+".join(map(str, value)) if isinstance(value, list) else str(value)

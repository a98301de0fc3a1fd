"""Results by target and method: runs grouped over seeds, and their differences from the baseline."""

from __future__ import annotations

import functools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusion.reporting.reading import Found
from fusion.reporting.scores import Score, Trained, all_scores
from fusion.reporting.statistics import LEVEL, Difference, Sample, compare, constant_scores, holm
from fusion.runs.identity import ADDED_LATER
from fusion.store.settings_groups import differing, key_of
from fusion.store.settings_groups import group as positions_of_equal

BASELINE = "single adapter"
_ORDER = ("head", "full fine-tuning", "LoRA", "BitFit", BASELINE, "alone", "fusion")
_BUDGET = ("optim.", "trainer.", "data.", "loss.")  # prefixes of the settings that make up the training budget


@dataclass
class Group:
    """Runs of one method with one setting on one target, which only differ in their seeds."""

    method: str
    entries: list[Score]
    metric: str
    differing: str  # settings in which the groups of the method differ
    others: int  # number of other groups of the method
    chosen_on: str = "validation"  # split on which the best group of the method is selected
    against: Group | None = None  # baseline group that the group is compared with
    difference: Difference | None = None
    adjusted: float | None = None  # p-value of the difference after Holm's correction
    unequal: tuple[str, ...] = ()  # differences in training budget or examples, which rule out a verdict

    @property
    def anywhere(self) -> bool:
        return any(entry.anywhere for entry in self.entries)

    @functools.cached_property
    def budget(self) -> dict[str, Any]:
        """Settings of the training budget by config key; empty if nothing was trained on the target."""
        variant = {} if self.anywhere else self.entries[0].variant
        return {key: value for key, value in variant.items() if key.startswith(_BUDGET)}

    @property
    def seeds(self) -> int:
        return len({entry.seed for entry in self.entries})

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
    def title(self) -> str:
        """Name of the method, with the differing settings if it has more than one group."""
        return f"{self.method} ({self.differing})" if self.differing else self.method

    @property
    def setting(self) -> str:
        """Description of the best setting for captions; empty if the method has a single setting."""
        if not self.others:
            return ""
        return f"setting {self.differing}, best of {self.others + 1} on {self.chosen_on}"

    @property
    def verdict(self) -> str:
        """better, worse or same (not significant) after Holm's correction; unequal if budgets differ; else empty."""
        if self.difference is None:
            return ""
        if self.unequal or self.adjusted is None:
            return "unequal" if self.unequal else ""
        if self.adjusted > 1 - LEVEL:
            return "same"
        return "better" if self.difference.mean > 0 else "worse"


@dataclass
class Target:
    label: str
    task: str
    split: str
    metric: str
    rows: int | None  # number of examples of the split, if known
    groups: dict[str, Group]  # best group of each method on the validation split
    variants: dict[str, list[Group]]  # all groups of each method
    constant: dict[str, float] = field(default_factory=dict)  # metrics of predicting the majority class, if known
    majority: str = ""

    @property
    def every_group(self) -> list[Group]:
        return [group for groups in self.variants.values() for group in groups]

    @property
    def selected_here(self) -> list[str]:
        """Selections made on the reported examples, which make the scores optimistic."""
        entries = [entry for group in self.every_group for entry in group.entries if not entry.anywhere]
        results = [entry.trained.run.result for entry in entries if entry.trained is not None]
        of_epochs = [one for one in results if one.get("best_epoch") is not None and one.get("epochs") != 1]
        selected = []
        if any(key.rpartition("/")[2] == self.split for one in of_epochs for key in one.get("metrics") or {}):
            selected.append("the best epoch")
        if any(group.others and self.split.startswith(group.chosen_on) for group in self.groups.values()):
            selected.append("the best setting of a method")
        return selected

    @property
    def metrics(self) -> list[str]:
        names = (name for group in self.every_group for entry in group.entries for name in entry.metrics)
        return list(dict.fromkeys([self.metric, *names]))

    def settings(self, methods: Sequence[str]) -> list[str]:
        """Describe the best setting of each method that has more than one setting."""
        groups = [self.groups[method] for method in dict.fromkeys(methods) if method in self.groups]
        return [f"{group.method}: {group.setting}" for group in groups if group.setting]


def order_of(method: str) -> tuple[int, str]:
    if method.endswith(" alone"):
        return _ORDER.index("alone"), method
    matches = (n for n, name in enumerate(_ORDER) if method == name or method.startswith(f"{name} "))
    return next(matches, len(_ORDER)), method


def every_method(targets: Sequence[Target]) -> list[str]:
    return sorted({method for target in targets for method in target.groups}, key=order_of)


def targets_of(found: Found, split: str | None = None) -> list[Target]:
    """Return the targets of all runs on `split`, or else on the split of most methods, preferring test."""
    scores = all_scores(found.done)
    targets = []
    for task in sorted({score.task for score in scores}):
        of_task = [score for score in scores if score.task == task]
        trained = {score.setting for score in of_task if not score.anywhere}
        settings = sorted(trained or {score.setting for score in of_task}, key=str)
        for setting in settings:
            here = [s for s in of_task if s.setting == setting or (s.anywhere and s.setting[0] == setting[0])]
            target = _target(task, _label(task, setting, settings), here, split)
            targets += [] if target is None else [target]
    _correct(targets)
    return targets


def _label(task: str, setting: tuple[str, int | None], settings: Sequence[tuple[str, int | None]]) -> str:
    (backbone, limit), parts = setting, [task]
    if len({limit for _, limit in settings}) > 1:
        parts.append("all examples" if limit is None else f"{limit} examples")
    if len({backbone for backbone, _ in settings}) > 1:
        parts.append(backbone.rstrip("/").rsplit("/", 1)[-1])
    return " · ".join(parts)


def _target(task: str, label: str, scores: Sequence[Score], split: str | None) -> Target | None:
    split = split or _common_split(scores)
    here = [score for score in scores if score.split == split]
    named = [one.trained.metric_of.get(task) for one in here if one.trained is not None]
    metric = next((one for one in named if one), None) or next((m for one in here for m in one.metrics), "")
    here = [score for score in here if metric in score.metrics]
    if not here:
        return None
    methods = sorted({score.method for score in here}, key=order_of)
    variants = {name: _variants([one for one in here if one.method == name], metric) for name in methods}
    for found in variants.values():
        _best_first(found, scores, split)
    groups = {method: found[0] for method, found in variants.items()}
    labels = {one.predictions.fingerprint: one.predictions.labels for one in here if one.predictions is not None}
    rows = set(map(len, labels.values()))
    target = Target(label, task, split, metric, rows.pop() if len(rows) == 1 else None, groups, variants)
    if (base := groups.get(BASELINE)) is not None:
        for one in target.every_group:
            if one is not base:
                _compare(one, base, variants)
    if len(labels) == 1:  # all runs were evaluated on the same examples
        target.majority, target.constant = constant_scores(next(iter(labels.values())), target.metrics)
    return target


def _common_split(scores: Sequence[Score]) -> str:
    methods = defaultdict(set)
    for score in scores:
        methods[score.split].add(score.method)
    return max(methods, key=lambda split: (len(methods[split]), split.startswith("test"), split))


def _variants(scores: Sequence[Score], metric: str) -> list[Group]:
    """Return a group for each setting of a method, with the last run per seed and sources."""
    by_setting = [[scores[n] for n in places] for places in positions_of_equal(score.variant for score in scores)]
    variants = []
    for of, settings in zip(by_setting, differing([of[0].variant for of in by_setting]), strict=True):
        last = {(score.seed, score.inputs): score for score in of}
        names = ", ".join(
            f"{key}={_text(ADDED_LATER.get(key) if value is None else value)}"
            for key, value in _brief(settings).items()
        )
        variants.append(Group(of[0].method, [last[key] for key in sorted(last)], metric, names, len(by_setting) - 1))
    return variants


def _text(value: Any) -> str:
    return "null" if value is None else "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _brief(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Shorten the settings of multi-task runs to the task names."""
    names = [value for key, value in settings.items() if key.startswith("tasks.") and key.endswith(".name")]
    rest = {key: value for key, value in settings.items() if not key.startswith("tasks.")}
    return {"tasks": names} | rest if names else dict(settings)


def _best_first(groups: list[Group], scores: Sequence[Score], split: str) -> None:
    """Move the group with the best validation metric to the front, or the best on `split` if one is unknown."""
    choosing = [_validation_score(group, scores) for group in groups]
    known = [score for score in choosing if score is not None]
    if len(known) < len(groups):
        known = [group.mean for group in groups]
        for group in groups:
            group.chosen_on = split
    best = groups[known.index(max(known))]
    groups.sort(key=lambda group: group is not best)


def _validation_score(group: Group, scores: Sequence[Score]) -> float | None:
    runs = {id(one.run) for one in group.trained}
    validation = [one for one in scores if id(one.run) in runs and one.split.startswith("validation")]
    own = [one.metrics[group.metric] for one in validation if group.metric in one.metrics]
    return statistics.fmean(own) if own else None


def _compare(group: Group, base: Group, variants: Mapping[str, Sequence[Group]]) -> None:
    """Compare a group with the baseline group of the same budget or, if there is none, with the best one.

    If the method and the baseline were tried with the same budgets, their best groups are compared. Learning rates are
    part of the budget unless all of them are the defaults of their methods.
    """
    own, others = variants[group.method], variants[BASELINE]
    by_default = all(one.has_default_rate for each in (*own, *others) for one in each.trained)
    left_out = ("optim.lr",) if by_default else ()

    def budget(of: Group) -> dict[str, Any]:
        return {key: value for key, value in of.budget.items() if key not in left_out}

    tried, tried_by_base = ({key_of(budget(one)) for one in every} for every in (own, others))
    equal = [one for one in others if key_of(budget(one)) == key_of(budget(group)) and one is not group]
    fair = tried == tried_by_base and len(own) == len(others)
    if group.method == BASELINE or not group.budget or (fair and group is own[0]):
        group.against = base
    else:
        group.against = base if base in equal or not equal else equal[0]
        fair = False
    unequal: list[str] = []
    if group.budget and not fair:
        unequal = _budget_differences(budget(group), budget(group.against))
        selected = (len(own) > 1 and group is own[0]) or (len(others) > 1 and group.against is base)
        if group.method != BASELINE and selected:
            unequal += _values_tried(group, own, group.against, others)
    group.unequal = (*unequal, *_other_rows(group, group.against))
    # Seeds of source and target training are unrelated; multiple runs of a seed cannot be paired.
    by_seed = not group.anywhere and all(one.seeds == len(one.entries) for one in (group, group.against))
    ones, base_ones = (
        [Sample(one.seed, one.metrics[group.metric], one.predictions) for one in each.entries]
        for each in (group, group.against)
    )
    group.difference = compare(ones, base_ones, group.metric, by_seed)


def _other_rows(group: Group, against: Group) -> list[str]:
    """Describe how the evaluated examples of two groups differ; empty if some are equal or if unknown."""
    ones, others = (
        {kept.fingerprint: len(kept.labels) for entry in one.entries if (kept := entry.predictions) is not None}
        for one in (group, against)
    )
    if not ones or not others or ones.keys() & others.keys():
        return []
    count, other = (" or ".join(map(str, sorted(set(rows.values())))) for rows in (ones, others))
    return [f"evaluated on {count} {'different examples' if count == other else f'examples vs. {other}'}"]


def _budget_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} {_text(one.get(key))} vs. {_text(other.get(key))}"
        for key in sorted({*one, *other})
        if one.get(key) != other.get(key)
    ]


def _values_tried(group: Group, own: Sequence[Group], against: Group, others: Sequence[Group]) -> list[str]:
    """Describe settings with equal values that were selected from different sets of values."""
    named = []
    for key in sorted({*group.budget, *against.budget}):
        tried, by_base = ({key_of({"": one.budget.get(key)}) for one in every} for every in (own, others))
        if tried != by_base and group.budget.get(key) == against.budget.get(key):
            named.append(f"{key}: {len(tried)} values tried vs. {len(by_base)}")
    return named


def _correct(targets: Sequence[Target]) -> None:
    """Apply Holm's correction to the tests of each method: one per target, backbone and number of training examples."""
    for method in {method for target in targets for method in target.variants}:
        groups = [group for target in targets for group in target.variants.get(method, ())]
        tested = [(one, one.difference.p) for one in groups if one.difference and one.difference.p is not None]
        for (group, _), adjusted in zip(tested, holm([p for _, p in tested]), strict=True):
            group.adjusted = adjusted

"""The targets of all runs, the groups of seeds of each method on them, and their differences to the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fusion.reporting.reading import Found
from fusion.reporting.results import BASELINE, Group, Target, order_of, text
from fusion.reporting.scores import Score, all_scores
from fusion.reporting.statistics import Sample, compare, constant_scores, holm
from fusion.store.settings_groups import differing, key_of

_BUDGET_NAMES = {
    "optim.lr": "learning rate",
    "optim.head_lr": "head learning rate",
    "optim.patience": "patience",
    "optim.weight_decay": "weight decay",
    "optim.warmup": "warmup",
    "trainer.max_epochs": "epochs",
    "trainer.max_steps": "steps",
    "trainer.max_time": "time",
    "trainer.accumulate_grad_batches": "accumulated batches",
    "data.batch_size": "batch size",
    "data.tokens_per_batch": "tokens per batch",
    "data.max_length": "maximum length",
}


def targets_of(found: Found, split: str | None = None) -> list[Target]:
    """The targets of all runs, with the scores of every method.

    Args:
        split: whose scores; None: for each target the split on which most methods have one, preferably test.
    """
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
        parts.append("all rows" if limit is None else f"{limit} rows")
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
    variants = {name: _variants(name, [one for one in here if one.method == name], metric) for name in methods}
    for found in variants.values():
        _best_first(found, scores, split)
    rows = {len(one.predictions.labels) for one in here if one.predictions is not None}
    groups = {method: found[0] for method, found in variants.items()}
    target = Target(label, task, split, metric, rows.pop() if len(rows) == 1 else None, groups, variants)
    if (base := groups.get(BASELINE)) is not None:
        for group in target.every_group:
            if group is not base:
                _compare(group, base, variants)
    labels = {one.predictions.fingerprint: one.predictions.labels for one in here if one.predictions is not None}
    if len(labels) == 1:  # all scores are of the same rows
        target.majority, target.constant = constant_scores(next(iter(labels.values())), target.metrics)
    return target


def _common_split(scores: Sequence[Score]) -> str:
    """The split on which most methods have a score; of equals, one that did not select the best epoch."""
    methods: dict[str, set[str]] = {}
    for score in scores:
        methods.setdefault(score.split, set()).add(score.method)
    return max(methods, key=lambda split: (len(methods[split]), split.startswith("test"), split))


def _variants(method: str, scores: Sequence[Score], metric: str) -> list[Group]:
    """A group for each setting of the method; the last run of a seed with the same sources counts."""
    by_setting: dict[str, dict[Any, Score]] = {}
    for score in scores:
        by_setting.setdefault(key_of(score.variant), {})[score.seed, score.inputs] = score
    groups = [Group(method, [of[key] for key in sorted(of)], metric) for of in by_setting.values()]
    for group, settings in zip(groups, differing([one.entries[0].variant for one in groups]), strict=True):
        group.differing = ", ".join(f"{key}={text(value)}" for key, value in _brief(settings).items())
    return groups


def _best_first(groups: list[Group], scores: Sequence[Score], split: str) -> None:
    """Put the group with the best validation score first; if one is unknown, the best on the shown split."""
    choosing = [_validation_score(group, scores) for group in groups]
    known = [score for score in choosing if score is not None]
    used = known if len(known) == len(groups) else [group.mean for group in groups]
    for group in groups:
        group.others = len(groups) - 1
        group.chosen_on = "validation" if used is known else split
    best = groups[used.index(max(used))]
    groups.sort(key=lambda group: group is not best)


def _validation_score(group: Group, scores: Sequence[Score]) -> float | None:
    """The mean validation score of a group's trainings; None if unknown."""
    runs = {id(one.run) for one in group.trained}
    validation = [one for one in scores if id(one.run) in runs and one.split.startswith("validation")]
    own = [one.metrics[group.metric] for one in validation if group.metric in one.metrics]
    return statistics.fmean(own) if own else None


def _brief(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Only the names of multiple tasks, without the settings that follow from them."""
    names = [value for key, value in settings.items() if key.startswith("tasks.") and key.endswith(".name")]
    rest = {key: value for key, value in settings.items() if not key.startswith("tasks.")}
    return {"tasks": names} | rest if names else dict(settings)


def _compare(group: Group, base: Group, variants: Mapping[str, Sequence[Group]]) -> None:
    """Compare a group with the baseline's group of the same budget, if there is one, or else with the best.

    If a method and the baseline have tried the same budgets, the best of one is compared with the best of the other.
    """
    own, others = variants[group.method], variants[BASELINE]
    tried, tried_by_base = ({key_of(one.budget) for one in every} for every in (own, others))
    equal = [one for one in others if key_of(one.budget) == key_of(group.budget) and one is not group]
    fair = tried == tried_by_base and len(own) == len(others)
    if group.method == BASELINE or not group.budget or (fair and group is own[0]):
        group.against = base
    else:
        group.against = base if base in equal or not equal else equal[0]
        fair = False
    unequal: list[str] = []
    if group.budget and not fair:
        unequal = _budget_differences(group.budget, group.against.budget)
        selected = (len(own) > 1 and group is own[0]) or (len(others) > 1 and group.against is base)
        if group.method != BASELINE and selected:
            unequal += _values_tried(group, own, group.against, others)
    group.unequal = (*unequal, *_other_rows(group, group.against))
    # The seed of a source's training is unrelated to that of the target's; multiple runs of a seed are not pairs.
    by_seed = not group.anywhere and all(one.seeds == len(one.entries) for one in (group, group.against))
    ones, base_ones = (
        [Sample(one.seed, one.metrics[group.metric], one.predictions) for one in each.entries]
        for each in (group, group.against)
    )
    group.difference = compare(ones, base_ones, group.metric, by_seed)


def _other_rows(group: Group, against: Group) -> tuple[str, ...]:
    """How the scored rows of two groups differ; empty if they share some, or if it is unknown."""
    ones, others = group.fingerprints, against.fingerprints
    if not ones or not others or ones.keys() & others.keys():
        return ()
    counts = [" or ".join(map(str, sorted(set(rows.values())))) for rows in (ones, others)]
    if counts[0] == counts[1]:
        return (f"scored on other {counts[0]} rows",)
    return (f"scored on {counts[0]} rows against {counts[1]}",)


def _budget_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [
        f"{_BUDGET_NAMES.get(key, key)} {text(one.get(key))} against {text(other.get(key))}"
        for key in sorted({*one, *other}, key=lambda key: (key not in _BUDGET_NAMES, key))
        if one.get(key) != other.get(key)
    ]


def _values_tried(group: Group, own: Sequence[Group], against: Group, others: Sequence[Group]) -> list[str]:
    """Settings that the two share, but that one of them selected from other values."""
    named = []
    for key in sorted({*group.budget, *against.budget}):
        tried, by_base = ({key_of({"": one.budget.get(key)}) for one in every} for every in (own, others))
        if tried != by_base and group.budget.get(key) == against.budget.get(key):
            named.append(f"{_BUDGET_NAMES.get(key, key)}: {len(tried)} tried against {len(by_base)}")
    return named


def _correct(targets: Sequence[Target]) -> None:
    """Holm's correction: each method is a family of tests, with a test for each of its settings on each target."""
    for method in {method for target in targets for method in target.variants}:
        groups = [group for target in targets for group in target.variants.get(method, ())]
        tested = [(one, one.difference.p) for one in groups if one.difference and one.difference.p is not None]
        for (group, _), adjusted in zip(tested, holm([p for _, p in tested]), strict=True):
            group.adjusted = adjusted

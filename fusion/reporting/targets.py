"""Find the targets of all runs, and the groups of seeds of each method on them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fusion.reporting.comparison import compare_groups, constants, correct
from fusion.reporting.reading import Found
from fusion.reporting.results import Group, Target, order_of, text
from fusion.reporting.scores import Score, all_scores
from fusion.reporting.trained import trained_runs
from fusion.store.settings_groups import differing, key_of


def targets_of(found: Found, split: str | None = None) -> list[Target]:
    """The targets of all runs, with the scores of every method.

    Args:
        split: whose scores; None: for each target the split on which most methods have one, preferably test.
    """
    scores = all_scores(found.done, trained_runs(found.done))
    targets = []
    for task in sorted({score.task for score in scores}):
        of_task = [score for score in scores if score.task == task]
        trained = {score.setting for score in of_task if not score.anywhere}
        settings = sorted(trained or {score.setting for score in of_task}, key=str)
        for setting in settings:
            here = [s for s in of_task if s.setting == setting or (s.anywhere and s.setting[0] == setting[0])]
            target = _target(task, _label(task, setting, settings), here, split)
            targets += [] if target is None else [target]
    correct(targets)
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
    variants = {
        name: _variants(name, [one for one in here if one.method == name], metric) for name in methods
    }
    for found in variants.values():
        _best_first(found, scores, split)
    rows = {len(one.predictions.labels) for one in here if one.predictions is not None}
    groups = {method: found[0] for method, found in variants.items()}
    target = Target(label, task, split, metric, rows.pop() if len(rows) == 1 else None, groups, variants)
    compare_groups(target)
    target.majority, target.constant = constants(here, target.metrics)
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
    """Only the names of several tasks, without the settings that follow from them."""
    names = [value for key, value in settings.items() if key.startswith("tasks.") and key.endswith(".name")]
    rest = {key: value for key, value in settings.items() if not key.startswith("tasks.")}
    return {"tasks": names} | rest if names else dict(settings)

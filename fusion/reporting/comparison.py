"""Differences of methods to the baseline at equal budget, and Holm's correction over the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusion.reporting.results import BASELINE, Group, Target, text
from fusion.reporting.scores import Score
from fusion.reporting.statistics import compare, constant_scores, holm
from fusion.store.settings_groups import key_of

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


def compare_groups(target: Target) -> None:
    """Compare every group of a target with the baseline, if the target has one."""
    base = target.groups.get(BASELINE)
    for group in target.every_group if base is not None else ():
        if base is not None and group is not base:
            _compare(group, base, target.variants)


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
    # The seed of a source's training is unrelated to that of the target's; several runs of a seed are no pairs.
    by_seed = not group.anywhere and all(one.seeds == len(one.entries) for one in (group, group.against))
    group.difference = compare(group.samples, group.against.samples, group.metric, by_seed)


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


def correct(targets: Sequence[Target]) -> None:
    """Holm's correction: each method is a family of tests, with a test for each of its settings on each target."""
    for method in {method for target in targets for method in target.variants}:
        groups = [group for target in targets for group in target.variants.get(method, ())]
        tested = [
            (one, one.difference.p) for one in groups if one.difference and one.difference.p is not None
        ]
        for (group, _), adjusted in zip(tested, holm([p for _, p in tested]), strict=True):
            group.adjusted = adjusted


def constants(scores: Sequence[Score], metrics: Sequence[str]) -> tuple[str, dict[str, float]]:
    """The scores of a constant prediction, if all scores are of the same rows."""
    kept = [one.predictions for one in scores if one.predictions is not None]
    if len({one.fingerprint for one in kept}) != 1:
        return "", {}
    return constant_scores(kept[0].labels, metrics)

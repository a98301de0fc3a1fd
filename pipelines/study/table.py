"""Comparison of the methods with the single adapter, paired by seed, and its tables."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from fusion.cli.console import show_table
from fusion.reporting.statistics import Sample, compare, holm
from fusion.reporting.wording import mean_of
from pipelines.commands import say
from pipelines.study.config import BASELINE, METHODS, StudyConfig
from pipelines.study.results import Cell, best_rate


class Comparison(NamedTuple):
    """Difference of a method from the baseline on one target."""

    target: str
    rows: int
    method: str
    scores: list[float]
    baseline: list[float]
    difference: float
    low: float | None
    high: float | None
    p: float | None  # after Holm's correction over the targets


def comparisons(
    results: Mapping[Cell, Mapping[str, Any]], config: StudyConfig, against: str = BASELINE
) -> list[Comparison]:
    """Compare each method with a baseline, paired by seed. Methods and targets without results are omitted."""
    found = []
    for rows in config.rows:
        rates = {method: best_rate(results, config, rows, method) for method in {*config.methods, against}}
        for method in config.methods:
            each = []
            for target in config.targets:
                pairs = []
                for seed in config.seeds:
                    own, other = (
                        results.get(Cell(config.backbone, target, rows, one, seed, rates[one]))
                        for one in (method, against)
                    )
                    if own is not None and other is not None:
                        pairs.append((seed, own["test"], other["test"]))
                if not pairs:
                    continue
                difference = compare(
                    [Sample(s, one) for s, one, _ in pairs], [Sample(s, two) for s, _, two in pairs], ""
                )
                scores, baselines = [one for _, one, _ in pairs], [two for *_, two in pairs]
                numbers = difference.mean, difference.low, difference.high, difference.p
                each.append(Comparison(target, rows, method, scores, baselines, *numbers))
            known = [one for one in each if one.p is not None]
            adjusted = dict(zip((one.target for one in known), holm([one.p or 0.0 for one in known]), strict=True))
            found += [one._replace(p=adjusted.get(one.target)) for one in each]
    return found


def report(config: StudyConfig, results: Mapping[Cell, Mapping[str, Any]]) -> None:
    """Print, for each number of examples, the mean scores by target and method, and the differences from the adapter."""
    for rows in config.rows:
        every = [one for one in comparisons(results, config) if one.rows == rows]
        by_method: dict[str, list[Comparison]] = defaultdict(list)
        for one in every:
            by_method[one.method].append(one)
        if not every:
            continue
        say(f"\n{config.backbone}, {rows} training examples, test scores, mean ± standard deviation over seeds\n")
        targets = [target for target in config.targets if any(one.target == target for one in every)]
        table = [["method", *targets, "mean", "difference"]]
        for method, own in by_method.items():
            scores = {one.target: one.scores for one in own}
            shown = [mean_of(scores[target]) if target in scores else "" for target in targets]
            mean = (
                f"{statistics.fmean(map(statistics.fmean, scores.values())):.3f}" if len(scores) == len(targets) else ""
            )
            table.append(
                [METHODS[method].title, *shown, mean, f"{statistics.fmean(one.difference for one in own):+.3f}"]
            )
        show_table(table)
        say(f"\nPaired differences from the {METHODS[BASELINE].title}, 95 % intervals; p after Holm's correction\n")
        table = [["method", "wins", "ties", "losses", *targets]]
        for method, own in by_method.items():
            if method == BASELINE:
                continue
            wins = sum(one.low is not None and one.low > 0 for one in own)
            losses = sum(one.high is not None and one.high < 0 for one in own)
            differences = {one.target: shown_difference(one) for one in own}
            counts = [str(wins), str(len(own) - wins - losses), str(losses)]
            table.append([METHODS[method].title, *counts, *(differences.get(target, "") for target in targets)])
        show_table(table)


def shown_difference(one: Comparison) -> str:
    interval = "" if one.low is None or one.high is None else f" ({one.low:+.3f} to {one.high:+.3f})"
    p = "" if one.p is None else f", p {one.p:.2f}"
    return f"{one.difference:+.3f}{interval}{p}"

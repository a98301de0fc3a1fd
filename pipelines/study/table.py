"""Comparison of the methods with the single adapter, paired by seed: its tables and its picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusion.files import write_atomic
from fusion.reporting.statistics import holm
from fusion.reporting.wording import mean_of
from pipelines.commands import say
from pipelines.study.config import BASELINE, METHODS, SELECTED, SELECTED_FROM, StudyConfig
from pipelines.study.results import Cell, best_rate

Results = Mapping[Cell, Mapping[str, Any]]


class Comparison(NamedTuple):
    """Difference of a method from the baseline on one target, over the seeds that both have."""

    target: str
    method: str
    scores: list[float]
    difference: float
    low: float | None  # 95 % interval of the paired t-test; None with a single seed
    high: float | None
    p: float | None  # two-sided, after Holm's correction over the targets

    @property
    def verdict(self) -> str:
        """win or loss if p <= 0.05, else tie."""
        if self.p is None or self.p > 0.05:
            return "tie"
        return "win" if self.difference > 0 else "loss"


def title_of(method: str) -> str:
    return "adapter or fusion with a new adapter, by validation" if method == SELECTED else METHODS[method].title


def scores_of(results: Results, config: StudyConfig, rows: int, method: str) -> dict[str, dict[int, float]]:
    """Return the test scores by target and seed, with the selected learning rate.

    `SELECTED` takes, for each target and seed, the method of `SELECTED_FROM` with the highest validation score.
    """
    candidates = SELECTED_FROM if method == SELECTED else (method,)
    rates = {one: best_rate(results, config, rows, one) for one in candidates}
    found: dict[str, dict[int, float]] = {}
    for target in config.targets:
        for seed in config.seeds:
            cells = [Cell(config.backbone, target, rows, one, seed, rates[one]) for one in candidates]
            if all(cell in results for cell in cells):
                best = max(cells, key=lambda cell: results[cell]["validation"])  # the first of equal ones
                found.setdefault(target, {})[seed] = results[best]["test"]
    return found


def comparisons(results: Results, config: StudyConfig, rows: int) -> list[Comparison]:
    """Compare each method with the baseline, paired by seed. Methods and targets without results are omitted."""
    found = []
    base = scores_of(results, config, rows, BASELINE)
    for method in config.compared:
        each = []
        for target, by_seed in scores_of(results, config, rows, method).items():
            seeds = sorted(by_seed.keys() & base.get(target, {}).keys())
            if seeds:
                scores, baselines = [by_seed[seed] for seed in seeds], [base[target][seed] for seed in seeds]
                difference = statistics.fmean(scores) - statistics.fmean(baselines)
                each.append(Comparison(target, method, scores, difference, *paired_test(scores, baselines)))
        known = [one for one in each if one.p is not None]
        adjusted = dict(zip((one.target for one in known), holm([one.p or 0.0 for one in known]), strict=True))
        found += [one._replace(p=adjusted.get(one.target)) for one in each]
    return found


def paired_test(scores: Sequence[float], baselines: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the 95 % interval and the two-sided p-value of the paired t-test.

    The permutation test of `fusion.reporting.statistics` cannot have p < 0.06 with five pairs.
    """
    from scipy import stats

    differences = np.subtract(scores, baselines)
    if len(differences) < 2:
        return None, None, None
    if np.ptp(differences) < 1e-12:
        return float(differences[0]), float(differences[0]), float(abs(differences[0]) < 1e-12)
    test = stats.ttest_rel(scores, baselines)
    interval = test.confidence_interval()
    return float(interval.low), float(interval.high), float(test.pvalue)


class Panel(NamedTuple):
    """The comparisons of one backbone and number of training examples."""

    title: str
    targets: list[str]
    by_method: dict[str, list[Comparison]]


def panels_of(config: StudyConfig, results: Results) -> Iterator[Panel]:
    for backbone in sorted({cell.backbone for cell in results}):
        for rows in config.rows:
            every = comparisons(results, replace(config, backbone=backbone), rows)
            targets = [target for target in config.targets if any(one.target == target for one in every)]
            by_method = {method: [one for one in every if one.method == method] for method in config.compared}
            if every:
                title = f"{backbone}, {rows} training examples"
                yield Panel(title, targets, {method: own for method, own in by_method.items() if own})


def markdown(panels: Sequence[Panel]) -> str:
    """Return two tables for each panel, with a column for each method: scores, and differences from the baseline."""
    lines = []
    for panel in panels:
        others = {method: own for method, own in panel.by_method.items() if method != BASELINE}
        mark = {"win": " ▲", "loss": " ▼", "tie": ""}
        scores = {
            method: {one.target: mean_of(one.scores) + (mark[one.verdict] if method in others else "") for one in own}
            for method, own in panel.by_method.items()
        }
        summary = {
            "mean": {method: _mean(panel, own) for method, own in panel.by_method.items()},
            "mean difference": {method: f"{_mean_difference(own):+.3f}" for method, own in others.items()},
            "wins / ties / losses": {method: _counts(own) for method, own in others.items()},
        }
        lines += [f"### {panel.title}", "", "Test scores, mean ± standard deviation over seeds:", ""]
        lines += [*_table(panel, scores, summary), ""]
        if others:
            text = (
                f"Differences from the {METHODS[BASELINE].title}, paired by seed, with 95 % intervals. ▲ and ▼: p ≤ 0.05 "
                "after Holm's correction over the targets."
            )
            differences = {method: {one.target: _difference(one) for one in own} for method, own in others.items()}
            lines += [text, "", *_table(panel, differences, {}), ""]
    return "\n".join(lines)


def _table(panel: Panel, cells: Mapping[str, Mapping[str, str]], summary: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a Markdown table with a row for each target and `summary`, given the cells by method."""
    rows = [[target, *(cells[method].get(target, "") for method in cells)] for target in panel.targets]
    rows += [[title, *(of.get(method, "") for method in cells)] for title, of in summary.items()]
    header = ["target", *map(title_of, cells)]
    rule = f"|---|{'---:|' * len(cells)}"
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def _mean(panel: Panel, own: Sequence[Comparison]) -> str:
    """Mean score over the targets, if there is one for each."""
    return (
        f"{statistics.fmean(statistics.fmean(one.scores) for one in own):.3f}" if len(own) == len(panel.targets) else ""
    )


def _mean_difference(own: Sequence[Comparison]) -> float:
    return statistics.fmean(one.difference for one in own)


def _counts(own: Sequence[Comparison]) -> str:
    verdicts = [one.verdict for one in own]
    return " / ".join(str(verdicts.count(kind)) for kind in ("win", "tie", "loss"))


def _difference(one: Comparison) -> str:
    return f"{one.difference:+.3f}" + ("" if one.low is None else f" ({one.low:+.3f} to {one.high:+.3f})")


def report(config: StudyConfig, results: Results) -> None:
    """Print the tables, and write them and the picture next to the results."""
    from fusion.reporting.figures import differences_figure, save

    panels = list(panels_of(config, results))
    if not panels:
        say("no results yet")
        return
    text, path = markdown(panels), Path(config.results)
    say(f"\n{text}")
    write_atomic(path.with_suffix(".md"), text)
    drawn = {
        panel.title: {
            title_of(method): [(one.target, one.difference, one.low, one.high) for one in own]
            for method, own in panel.by_method.items()
            if method != BASELINE
        }
        for panel in panels
    }
    files = [path.with_suffix(".md")]
    if drawn := {title: methods for title, methods in drawn.items() if methods}:
        figure = differences_figure(drawn, f"difference from the {METHODS[BASELINE].title}")
        files += save(figure, path.parent, path.stem)
    say(f"written: {', '.join(map(str, files))}")

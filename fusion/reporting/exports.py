"""The files for a paper: figures as PNG and SVG, tables as CSV and LaTeX."""

from __future__ import annotations

import statistics
import warnings
from pathlib import Path
from typing import Any

from fusion.reporting import figures, tables
from fusion.reporting.attention import layer_names
from fusion.reporting.contents import Contents, ablation, chosen_settings, costs
from fusion.reporting.results import BASELINE
from fusion.reporting.sections import curve_methods, every_method
from fusion.reporting.wording import chosen_setting, file_name, score


def write_files(contents: Contents, folder: Path) -> list[Path]:
    """The figures as PNG and SVG, the tables as CSV and LaTeX.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [path for table in tables_of(contents) for path in tables.save(table, folder)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font has not
        for name, figure in figures_of(contents):
            written += figures.save(figure, folder, name)
    return written


def figures_of(contents: Contents) -> list[tuple[str, Any]]:
    """Every figure with the name of its files."""
    made: list[tuple[str, Any]] = []
    if contents.targets:
        made.append(("scores", figures.scores_figure(contents.targets)))
    chosen = [f"{one.target} ← {one.method}: {one.setting}" for one in contents.attention if one.setting]
    for one in contents.attention:
        figure = figures.noted(figures.attention_figure(one), [one.setting] if one.setting else [])
        made.append((file_name("attention", one.target, one.method), figure))
    if contents.attention:
        made.append(
            ("attention-by-target", figures.noted(figures.by_target_figure(contents.attention), chosen))
        )
        if any(one.entropy is not None for one in contents.attention):
            made.append(("entropy", figures.noted(figures.entropy_figure(contents.attention), chosen)))
    for target, method, _, inspection in contents.inspected:
        if inspection["masked"]:
            figure = figures.noted(figures.pruning_figure(inspection), chosen_settings(target, [method]))
            made.append((file_name("needed", target.label, method), figure))
    for target, shown in contents.curves:
        figure = figures.curves_figure(shown, list(target.groups))
        figures.noted(figure, chosen_settings(target, curve_methods(shown)))
        made.append((file_name("curves", target.label), figure))
    for target in contents.everything:
        made.append((file_name("cost", target.label), figures.cost_figure(target, costs(target))))
    return made


def tables_of(contents: Contents) -> list[tables.Table]:
    """Every table that stands in the page."""
    methods = every_method(contents.everything)
    header = ("target", "metric", "split", *methods)
    rows, shown = [], []
    for target in contents.everything:
        groups = [target.groups.get(method) for method in methods]
        rows.append(
            [target.label, target.metric, target.split, *(None if g is None else g.mean for g in groups)]
        )
        shown.append(
            [target.label, target.metric, target.split, *("--" if g is None else score(g) for g in groups)]
        )
    caption = "Mean and standard deviation over the seeds" + "".join(
        f"; {target.label}, {line}"
        for target in contents.everything
        for line in chosen_settings(target, methods)
    )
    made = [tables.Table("scores", caption, header, rows, shown)]
    header = (
        "target",
        "method",
        "settings",
        "seeds",
        "mean",
        "sd",
        "difference",
        "low",
        "high",
        "p",
        "p (Holm)",
    )
    header += ("wins", "ties", "losses", "over")
    header += ("not at equal budget", "pairs")
    rows = []
    for target in contents.targets:
        for group in target.every_group:
            d = group.difference
            rest: list[Any] = [None] * 9
            if d is not None:
                rest = [d.mean, d.low, d.high, d.p, group.adjusted, d.wins, d.ties, d.losses, d.unit]
            rows.append(
                [
                    target.label,
                    group.method,
                    group.differing,
                    len(group.scores),
                    group.mean,
                    group.deviation,
                    *rest,
                    "; ".join(group.unequal),
                    None if d is None else d.pairs,
                ]
            )
    made.append(tables.Table("differences", f"Differences to the {BASELINE}", header, rows))
    header = ("target", "split", "method", "settings", "seeds", "metric", "mean", "sd")
    rows = []
    for target in contents.everything:
        for group in target.every_group:
            for metric in target.metrics:
                if values := group.scores_by(metric):
                    sd = statistics.stdev(values) if len(values) > 1 else None
                    rows.append(
                        [
                            target.label,
                            target.split,
                            group.method,
                            group.differing,
                            len(values),
                            metric,
                            statistics.fmean(values),
                            sd,
                        ]
                    )
        for metric, value in target.constant.items():
            rows.append([target.label, target.split, target.majority, "", None, metric, value, None])
    made.append(tables.Table("metrics", "Every metric, means over the seeds", header, rows))
    for one in contents.attention:
        made.append(
            tables.Table(
                file_name("attention", one.target, one.method),
                f"Mean attention, {one.target} <- {one.method}, {one.runs} runs"
                + (f", {one.setting}" if one.setting else ""),
                ("layer", *one.sources, "entropy"),
                [
                    [layer, *map(float, one.mean[n]), None if one.entropy is None else float(one.entropy[n])]
                    for n, layer in enumerate(layer_names(one.slots))
                ],
            )
        )
    rows = []
    for target, method, trained, inspection in contents.inspected:
        metric, full = next(iter(inspection["metrics"].items()))
        changes = ablation(inspection, metric)
        for source, one in inspection["masked"].items():
            without, d = one["metrics"][metric], changes[source]
            rows.append(
                [
                    target.label,
                    method,
                    trained.name,
                    source,
                    metric,
                    full,
                    without,
                    without - full,
                    d.low,
                    d.high,
                    chosen_setting(target.groups[method]),
                ]
            )
    header = (
        "target",
        "method",
        "artifact",
        "source",
        "metric",
        "with it",
        "without it",
        "change",
        "low",
        "high",
        "setting",
    )
    made.append(tables.Table("needed", "Each source masked in turn, nothing trained again", header, rows))
    header = (
        "target",
        "method",
        "score",
        "parameters that train",
        "stored bytes",
        "seconds",
        "tokens per second",
    )
    header += ("peak memory bytes", "energy (J)")
    keys = ("score", "parameters", "bytes", "seconds", "tokens", "memory", "energy")
    rows = [
        [t.label, row["method"], *(row[key] for key in keys)] for t in contents.everything for row in costs(t)
    ]
    made.append(tables.Table("cost", "Cost, means over the seeds", header, rows))
    return made

"""The files for a paper: figures as PNG and SVG, tables as CSV and LaTeX."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from fusion.reporting import figures, tables
from fusion.reporting.ablation import ablation
from fusion.reporting.attention import layer_names
from fusion.reporting.contents import Contents, costs
from fusion.reporting.wording import chosen_settings, file_name, titled


def write_files(contents: Contents, folder: Path) -> list[Path]:
    """
    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [path for table in tables.tables_of(contents) for path in tables.save(table, folder)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font does not have
        for name, figure in figures_of(contents):
            written += figures.save(figure, folder, name)
    return written


def figures_of(contents: Contents) -> list[tuple[str, Any]]:
    """Every figure with the name of its files."""
    made: list[tuple[str, Any]] = []
    attention = contents.attention
    if contents.targets:
        panels = {
            f"{one.label}: {one.metric} ({one.split})": {
                titled(g): (g.method, g.scores) for g in one.every_group
            }
            for one in contents.targets
        }
        made.append(("scores", figures.scores_figure(panels)))
    for one in attention:
        figure = figures.heatmap_figure(one.mean, layer_names(one.slots), one.sources, "layer", one.title)
        setting = [one.setting] if one.setting else []
        made.append((file_name("attention", one.target, one.method), figures.noted(figure, setting)))
    chosen = [f"{one.title}: {one.setting}" for one in attention if one.setting]
    if attention:
        made.append(("attention-by-target", figures.noted(figures.by_target_figure(attention), chosen)))
        if any(one.entropy is not None for one in attention):
            made.append(("entropy", figures.noted(figures.entropy_figure(attention), chosen)))
    for target, method, _, inspection in contents.inspected:
        metric = next(iter(inspection["metrics"]))
        if changes := ablation(inspection, metric):
            steps = [(len(step["kept"]), step["metrics"][metric]) for step in inspection.get("pruned") or []]
            figure = figures.noted(
                figures.pruning_figure(metric, changes, steps), chosen_settings(target, [method])
            )
            made.append((file_name("needed", target.label, method), figure))
    for target, shown in contents.curves:
        methods = [method for of_metric in shown.values() for method in of_metric]
        figure = figures.curves_figure(shown, list(target.groups))
        figures.noted(figure, chosen_settings(target, methods))
        made.append((file_name("curves", target.label), figure))
    for target in contents.everything:
        figure = figures.cost_figure(costs(target), target.label, target.metric)
        made.append((file_name("cost", target.label), figure))
    return made

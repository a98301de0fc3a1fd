"""The contents of the page and of the files beside it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusion.reporting import figures
from fusion.reporting.attention import attention_of, layer_names
from fusion.reporting.curves import shown_curves
from fusion.reporting.inspections import ablation, is_complete
from fusion.reporting.reading import Found
from fusion.reporting.scores import Trained
from fusion.reporting.targets import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Contents:
    """
    Attributes:
        targets: those with more than one method, or all if there are none.
        single: the others, such as source tasks.
    """

    def __init__(self, found: Found, targets: Sequence[Target], notes: Sequence[str] = ()) -> None:
        self.found, self.notes = found, list(notes)
        several = [target for target in targets if len(target.every_group) > 1]
        self.targets = several or list(targets)
        self.single = [target for target in targets if several and len(target.every_group) == 1]
        self.everything = [*self.targets, *self.single]
        self.attention = attention_of(self.everything, found)

    @functools.cached_property
    def inspected(self) -> list[tuple[Target, str, Trained, dict[str, Any]]]:
        """The first inspected run of each method of each target."""
        seen = []
        for target in self.everything:
            for method, group in target.groups.items():
                inspections = ((one, self.found.inspections.get(one.hash or "")) for one in group.trained)
                complete = [(target, method, one, i) for one, i in inspections if i and is_complete(i)]
                seen += complete[:1]
        return seen

    @functools.cached_property
    def figures(self) -> dict[tuple[str, ...], tuple[str, Figure]]:
        """Every figure with its description; by its kind, target and method, which name its files."""
        made: dict[tuple[str, ...], tuple[str, Figure]] = {}

        def add(*name: str, title: str, figure: Figure, settings: Sequence[str] = ()) -> None:
            made[name] = (title, figures.noted(figure, settings))

        if self.targets:
            panels = {
                f"{one.label}: {one.metric} ({one.split})": {
                    group.title: (group.method, group.scores) for group in one.every_group
                }
                for one in self.targets
            }
            add("scores", title="Scores", figure=figures.scores_figure(panels))
        for one in self.attention:
            figure = figures.heatmap_figure(one.mean, layer_names(one.slots), one.sources, "layer", one.title)
            settings = [one.setting] if one.setting else []
            add("attention", one.target, one.method, title=one.title, figure=figure, settings=settings)
        settings = [f"{one.title}: {one.setting}" for one in self.attention if one.setting]
        if self.attention:
            figure = figures.by_target_figure(self.attention)
            add("attention-by-target", title="Sources by targets", figure=figure, settings=settings)
        if any(one.entropy is not None for one in self.attention):
            title = "Entropy of the attention in each layer, the mean over tokens, relative to uniform attention"
            add("entropy", title=title, figure=figures.entropy_figure(self.attention), settings=settings)
        for target, method, _, inspection in self.inspected:
            metric = next(iter(inspection["metrics"]))
            if changes := ablation(inspection, metric):
                steps = [(len(step["kept"]), step["metrics"][metric]) for step in inspection["pruned"] or []]
                figure = figures.ablation_figure(metric, changes, steps)
                title = f"Score without each source, and with fewer and fewer, {target.label}"
                add("needed", target.label, method, title=title, figure=figure, settings=target.settings([method]))
        for target in self.everything:
            if curves := shown_curves(target, self.found):
                figure = figures.curves_figure(curves, list(target.groups))
                settings = target.settings([name for metric in curves.values() for name in metric])
                title = f"{', '.join(curves)} over the steps, {target.label}"
                add("curves", target.label, title=title, figure=figure, settings=settings)
            figure = figures.cost_figure(costs(target), target.label, target.metric)
            add("cost", target.label, title=f"Score against parameters and seconds, {target.label}", figure=figure)
        return made


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
            rows.append({"method": group.title, "score": group.mean, **means})
    return rows


def _mean(results: Sequence[Mapping[str, Any]], part: str, key: str) -> float | None:
    values = [(result.get(part) or {}).get(key) for result in results]
    numbers = [float(value) for value in values if isinstance(value, (int, float))]
    return sum(numbers) / len(numbers) if numbers else None

"""Source attention: of each fusion the mean attention weights of its layers, over its seeds.

Shapes: L slots, N sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion.reporting.reading import Found
from fusion.reporting.results import Target, Trained
from fusion.reporting.wording import chosen_setting
from fusion.runs.run import ATTENTION

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Attention:
    """mean: (L, N), of the seeds. entropy: (L,) in nats, or None where the weights are no shares. runs: how many.

    setting: which of the method's settings it is, see `chosen_setting`.
    """

    target: str
    method: str
    sources: tuple[str, ...]
    slots: tuple[str, ...]
    mean: Floats
    entropy: Floats | None
    runs: int
    setting: str = ""

    @property
    def overall(self) -> Floats:
        """(N,): the mean over the slots."""
        return np.asarray(self.mean.mean(0))

    @property
    def most(self) -> float:
        """The entropy of paying all sources the same attention."""
        return float(np.log(len(self.sources))) if len(self.sources) > 1 else 0.0


def attention_of(targets: Sequence[Target], found: Found) -> list[Attention]:
    """Of every fusion in the table, with its best setting on validation, what its trainings noted in their best epoch, or its inspection saw."""
    every = []
    for target in targets:
        for method, group in target.groups.items():
            seen = [one for trained in group.trained if (one := _of_run(trained, found)) is not None]
            # Runs of one group have the same sources in the same order, whatever their names are.
            like = [one for one in seen if (len(one[0]), one[1]) == (len(seen[0][0]), seen[0][1])]
            if not like:
                continue
            slots = like[0][1]
            entropies = [entropy for *_, entropy in like if entropy is not None]
            every.append(
                Attention(
                    target.label,
                    method,
                    _source_names(group.trained, [one[0] for one in like]),
                    tuple(slots),
                    np.mean([mean for *_, mean, _ in like], axis=0),
                    np.mean(entropies, axis=0) if len(entropies) == len(like) else None,
                    len(like),
                    chosen_setting(group),
                )
            )
    return every


def _source_names(runs: Sequence[Trained], names: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """What the sources are called over all runs: by their tasks, where each seed has its own seeds of them."""
    settings = runs[0].variant.get("sources") or ()
    tasks = tuple(str(source.get("task.name") or source.get("artifact")) for source in settings)
    same = all(list(one) == list(names[0]) for one in names)
    return tuple(names[0]) if same or len(set(tasks)) != len(names[0]) else tasks


def _of_run(trained: Trained, found: Found) -> tuple[list[str], list[str], Floats, Floats | None] | None:
    best = trained.run.result.get("best_epoch")
    lines = trained.run.lines(ATTENTION)
    chosen: dict[str, Any] | None = next(
        (line for line in reversed(lines) if line.get("epoch") == best), None
    )
    if chosen is None and lines:
        chosen = lines[-1]
    if chosen is None and (inspection := found.inspections.get(trained.hash or "")) is not None:
        chosen = {"sources": inspection.get("sources"), "slots": inspection.get("attention")}
    if chosen is None:
        return None
    try:
        sources, slots = [str(name) for name in chosen["sources"]], chosen["slots"]
        mean = np.array([slot["mean"] for slot in slots.values()], float)
        if not sources or mean.shape != (len(slots), len(sources)) or not np.isfinite(mean).all():
            return None
        entropies = [slot.get("entropy") for slot in slots.values()]
        entropy = None if None in entropies else np.array(entropies, float)
        return sources, list(map(str, slots)), mean, entropy
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def by_target(every: Sequence[Attention], layer: int | None = None) -> tuple[list[str], list[str], Floats]:
    """The paper's Figure 4: fusions by rows, sources by columns, NaN where a fusion has not the source.

    Args:
        layer: the number of a slot; None: the mean over all.

    Returns:
        Names of the fusions and of the sources, and (fusions, sources).
    """
    columns = list(dict.fromkeys(source for one in every for source in one.sources))
    several = len({one.method for one in every}) > 1
    rows = [f"{one.target} ({one.method})" if several else one.target for one in every]
    matrix = np.full((len(every), len(columns)), np.nan)
    for row, one in enumerate(every):
        values = one.overall if layer is None else one.mean[min(layer, len(one.mean) - 1)]
        for source, value in zip(one.sources, values, strict=True):
            matrix[row, columns.index(source)] = value
    return rows, columns, matrix


def layer_names(slots: Sequence[str]) -> list[str]:
    """`0.feedforward` as `0`, as `adapter.layers` counts, with the site where a layer has several."""
    several = len({slot.partition(".")[2] for slot in slots}) > 1
    named = []
    for slot in slots:
        layer, _, site = slot.partition(".")
        named.append(f"{layer} {site.replace('_', ' ')}" if several else layer)
    return named

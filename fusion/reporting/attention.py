"""Source attention: the mean attention weights of each fusion by layer, over its seeds.

Shapes: L slots, N sources.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion.reporting.reading import Found, read_lines
from fusion.reporting.scores import Trained
from fusion.reporting.targets import Target
from fusion.runs.run import ATTENTION

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Attention:
    """mean: (L, N), over the seeds. entropy: (L,) in nats, or None if the weights do not sum to one. runs: how many.

    setting: which of the method's settings it is, see `Group.setting`.
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
    def title(self) -> str:
        return f"{self.target} ← {self.method}"

    @property
    def overall(self) -> Floats:
        """(N,): the mean over the slots."""
        return np.asarray(self.mean.mean(0))

    @property
    def largest(self) -> float:
        """The largest mean weight, for the colors of a heatmap."""
        return float(max(self.mean.max(), 1e-9))

    @property
    def max_entropy(self) -> float:
        """The entropy of uniform attention."""
        return float(np.log(len(self.sources))) if len(self.sources) > 1 else 0.0


def attention_of(targets: Sequence[Target], found: Found) -> list[Attention]:
    """Of each fusion, with its best setting on validation, the record of the best epoch or of its inspection."""
    every = []
    for target in targets:
        for method, group in target.groups.items():
            seen = [one for trained in group.trained if (one := _of_run(trained, found)) is not None]
            # Runs of one group have the same sources in the same order, whatever they are named.
            alike = [one for one in seen if (len(one[0]), one[1]) == (len(seen[0][0]), seen[0][1])]
            if alike:
                names, slots, means, entropies = zip(*alike, strict=True)
                sources = _source_names(group.trained, names)
                entropy = None if any(one is None for one in entropies) else np.mean(entropies, axis=0)
                mean = np.mean(means, axis=0)
                every.append(
                    Attention(target.label, method, sources, slots[0], mean, entropy, len(alike), group.setting)
                )
    return every


def _source_names(runs: Sequence[Trained], names: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The names of the sources over all runs: their tasks, if each seed has its own seeds of them."""
    settings = runs[0].variant.get("sources") or ()
    tasks = tuple(str(source.get("task.name") or source.get("artifact")) for source in settings)
    same = all(one == names[0] for one in names)
    return tuple(names[0]) if same or len(set(tasks)) != len(names[0]) else tasks


def _of_run(trained: Trained, found: Found) -> tuple[list[str], tuple[str, ...], Floats, Floats | None] | None:
    """Sources, slots, mean (L, N) and entropy (L,); None if there is no valid record."""
    lines = read_lines(trained.run.folder / ATTENTION)
    best = [line for line in lines if line.get("epoch") == trained.run.result.get("best_epoch")]
    record: dict[str, Any] | None = next(reversed(best or lines), None)
    if record is None and (inspection := found.inspections.get(trained.hash or "")) is not None:
        record = {"sources": inspection.get("sources"), "slots": inspection.get("attention")}
    with contextlib.suppress(TypeError, KeyError, ValueError, AttributeError):
        sources, slots = [str(name) for name in record["sources"]], record["slots"]  # type: ignore[index]
        mean = np.array([slot["mean"] for slot in slots.values()], float)
        entropies = [slot.get("entropy") for slot in slots.values()]
        if sources and mean.shape == (len(slots), len(sources)) and np.isfinite(mean).all():
            entropy = None if None in entropies else np.array(entropies, float)
            return sources, tuple(map(str, slots)), mean, entropy
    return None


def by_target(every: Sequence[Attention], layer: int | None = None) -> tuple[list[str], list[str], Floats]:
    """The paper's Figure 4: fusions by sources, NaN where a fusion does not have the source.

    Args:
        layer: the index of a slot; None: the mean over all.

    Returns:
        Names of the fusions and of the sources, and (fusions, sources).
    """
    import pandas as pd

    several = len({one.method for one in every}) > 1
    rows = [f"{one.target} ({one.method})" if several else one.target for one in every]
    values = [one.overall if layer is None else one.mean[min(layer, len(one.mean) - 1)] for one in every]
    frame = pd.DataFrame([dict(zip(a.sources, v, strict=True)) for a, v in zip(every, values, strict=True)])
    return rows, list(frame.columns), frame.to_numpy(float)


def layer_names(slots: Sequence[str]) -> list[str]:
    """`0.feedforward` as `0`, the number in `adapter.layers`, with the site if a layer has more than one."""
    parts = [slot.partition(".") for slot in slots]
    several = len({site for _, _, site in parts}) > 1
    return [f"{layer} {site.replace('_', ' ')}" if several else layer for layer, _, site in parts]

"""Source attention per layer and training curves, aggregated over seeds, and inspections of fusions.

Shapes: L slots, N sources.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusion.backbones.slots import SlotAddress
from fusion.reporting.reading import Found, read_lines
from fusion.reporting.scores import Trained
from fusion.reporting.statistics import Difference, Floats, Predictions, Sample, compare
from fusion.reporting.targets import Target
from fusion.runs.run import ATTENTION

if TYPE_CHECKING:
    from pandas import DataFrame

POINTS = 200  # maximum number of points of a curve; longer curves are subsampled
_STEPS = 255  # the byte that encodes a weight of 1


@dataclass(frozen=True)
class Attention:
    """Source attention of a fusion, averaged over runs with different seeds."""

    target: str
    method: str
    sources: tuple[str, ...]
    slots: tuple[str, ...]
    mean: Floats  # (L, N)
    entropy: Floats | None  # (L,) in nats; None if the weights do not sum to one
    runs: int
    setting: str = ""

    @property
    def title(self) -> str:
        return f"{self.target} ← {self.method}"

    @property
    def max_entropy(self) -> float:
        return float(np.log(len(self.sources))) if len(self.sources) > 1 else 0.0


def attention_of(targets: Sequence[Target], found: Found) -> list[Attention]:
    """Return the attention of each fusion with its best setting, at the best epoch or else from its inspection."""
    every = []
    for target in targets:
        for method, group in target.groups.items():
            if group.anywhere:
                continue  # its attention is that on a different task
            seen = [one for trained in group.trained if (one := _of_run(trained, found)) is not None]
            # The runs of a group have the same sources in the same order, regardless of their names.
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
    """Return the names of the sources, or the names of their tasks if the sources differ between the seeds."""
    settings = runs[0].variant.get("sources") or ()
    tasks = tuple(str(source.get("task.name") or source.get("artifact")) for source in settings)
    same = all(one == names[0] for one in names)
    return tuple(names[0]) if same or len(set(tasks)) != len(names[0]) else tasks


def _of_run(trained: Trained, found: Found) -> tuple[list[str], tuple[str, ...], Floats, Floats | None] | None:
    """Return sources, slots, mean (L, N) and entropy (L,), or `None` if there is no valid record."""
    lines = list(read_lines(trained.run.folder / ATTENTION))
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
    """Return fusions, sources and weights (fusions, sources) of a slot, or averaged over all slots; NaN: not a source.

    Figure 4 of Pfeiffer et al. 2021, "AdapterFusion".
    """
    import pandas as pd

    several = len({one.method for one in every}) > 1
    rows = [f"{one.target} ({one.method})" if several else one.target for one in every]
    values = [one.mean.mean(0) if layer is None else one.mean[min(layer, len(one.mean) - 1)] for one in every]
    frame = pd.DataFrame([dict(zip(a.sources, v, strict=True)) for a, v in zip(every, values, strict=True)])
    return rows, list(frame.columns), frame.to_numpy(float)


def layer_names(slots: Sequence[str]) -> list[str]:
    """Format slots such as `0.feedforward` as `0`, or as `0 feedforward` if a layer has more than one slot.

    `decoder.0.feedforward` is `decoder 0`.
    """
    found = [SlotAddress.parse(slot) for slot in slots]
    several = len({address.site for address in found}) > 1
    return [
        " ".join([*filter(None, [a.stack]), str(a.layer), *([a.site.replace("_", " ")] if several else [])])
        for a in found
    ]


def slider_positions(slots: Sequence[str]) -> list[str]:
    return ["all layers (mean)", *(f"layer {name}" for name in layer_names(slots))]


def curves_of(target: Target, found: Found) -> dict[str, dict[str, DataFrame]]:
    """Return mean, min, max and count over the seeds (columns) by step, for each metric and method."""
    import pandas as pd

    curves: dict[str, dict[str, DataFrame]] = {}
    for method, group in target.groups.items():
        if group.anywhere:
            continue
        histories = [history_of(trained, found) for trained in group.trained]
        for metric in dict.fromkeys(name for history in histories for name in history.columns):
            seeds = [history[metric].dropna() for history in histories if metric in history]
            points = pd.concat(seeds, axis=1, join="inner").sort_index()
            if len(points) > POINTS:
                points = points.iloc[np.linspace(0, len(points) - 1, POINTS).round().astype(int)]
            if len(points):
                curves.setdefault(metric, {})[method] = points.agg(["mean", "min", "max", "count"], axis=1)
    return curves


def shown_curves(target: Target, found: Found) -> dict[str, dict[str, DataFrame]]:
    """Return the curves shown in the report: each loss term, and the metric that selects the best epoch."""
    every = curves_of(target, found)
    terms = [name for name in every if name.startswith("train/") and name.endswith("loss")]
    if "train/loss" in terms and "train/task_loss" in terms and len(terms) == 2:
        terms.remove("train/task_loss")  # the only term is the loss
    scores = [name for name in every if not name.startswith("train/") and name.endswith(f"/{target.metric}")]
    return {name: every[name] for name in [*sorted(terms), *scores[:1]]}


def history_of(trained: Trained, found: Found) -> DataFrame:
    """Return the finite metrics of a training run by step. If parts of a resumed run overlap, the last part is used."""
    import pandas as pd

    values: dict[str, dict[int, float]] = {}
    for line in found.history(trained.run.folder):
        if type(step := line.get("step")) is int:
            for name, value in line.items():
                if "/" in name and type(value) in (int, float) and np.isfinite(value):
                    values.setdefault(name, {})[step] = float(value)
    return pd.DataFrame(values)


def ablation(inspection: Mapping[str, Any], metric: str) -> dict[str, Difference]:
    """Return the change of the metric without each source, with a confidence interval if predictions are stored."""
    rows = {key: inspection.get(key) for key in ("fingerprint", "labels")}
    full, kept = inspection["metrics"][metric], Predictions.of(rows | {"predicted": inspection.get("predicted")})
    made = {}
    for source, one in inspection["masked"].items():
        score, without = one["metrics"][metric], Predictions.of(rows | {"predicted": one.get("predicted")})
        if kept is None or without is None:
            made[source] = Difference(score - full)
        else:
            made[source] = compare([Sample(0, score, without)], [Sample(0, full, kept)], metric)
    return made


def pack(weights: NDArray[np.floating]) -> str:
    """Encode weights between 0 and 1 with one byte each, in base64 and row-major order."""
    return base64.b64encode((weights.clip(0, 1) * _STEPS).round().astype(np.uint8).tobytes()).decode()


def unpack(packed: str, shape: tuple[int, ...]) -> NDArray[np.floating]:
    """Invert `pack`, up to the quantization error. Raises ValueError if the input is invalid or has a different size."""
    values: NDArray[np.floating] = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(shape) / _STEPS
    return values

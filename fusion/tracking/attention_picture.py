"""What a fusion attends to, as a picture and as rows: a record of attention.jsonl, layers × sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NUMBERS_UP_TO = 12  # sources; more are shown by colour alone
COLUMNS = ("slot", "source", "mean", "entropy", "value_distance")


def rows(record: Mapping[str, Any]) -> list[list[Any]]:
    """One row for each slot and source, in the order of `COLUMNS`."""
    return [
        [slot, source, weight, values["entropy"], values["value_distance"]]
        for slot, values in record["slots"].items()
        for source, weight in zip(record["sources"], values["mean"], strict=True)
    ]


def picture(record: Mapping[str, Any]) -> Any:
    """The mean weights as pixels, (height, width, 3) uint8: a row a slot, the lowest layer first.

    Drawn without pyplot, so that it needs no screen and leaves a notebook's figures alone.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sources: Sequence[str] = record["sources"]
    slots = list(record["slots"])
    weights = np.array([record["slots"][slot]["mean"] for slot in slots], dtype=float)
    figure = Figure(
        figsize=(2.2 + 0.62 * len(sources), 1.4 + 0.3 * len(slots)), dpi=100, layout="constrained"
    )
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low = min(0.0, float(weights.min()))
    image = axes.imshow(
        weights, cmap="viridis", vmin=low, vmax=max(1e-6, float(weights.max())), aspect="auto"
    )
    axes.set_xticks(range(len(sources)), list(sources), rotation=40, ha="right")
    axes.set_yticks(range(len(slots)), slots)
    axes.set_title(f"epoch {record['epoch']}, step {record['step']}", fontsize=9)
    figure.colorbar(image, ax=axes, label="mean weight")
    if len(sources) <= NUMBERS_UP_TO:
        half = low + 0.6 * (float(weights.max()) - low)
        for (row, column), weight in np.ndenumerate(weights):
            colour = "black" if weight > half else "white"
            axes.text(column, row, f"{weight:.2f}", ha="center", va="center", color=colour, fontsize=7)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

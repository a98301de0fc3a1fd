"""Score against trained parameters, a point a row."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipelines.compare.rows import COMPOSITIONS, MULTITASK, SINGLE
from pipelines.compare.scores import RowResult

COLOURS = {SINGLE: "#5b8db8", MULTITASK: "#6a9955", COMPOSITIONS: "#d9772b"}
# Where a label may stand, in points from its point: near places first.
PLACES = [
    (dx * side, dy)
    for dy in (0, 10, -10, 20, -20, 30, -30, 42, -42, 56, -56, 72, -72)
    for dx in (6, 18, 36)
    for side in (1, -1)
    if dx <= 6 + abs(dy)
]


def draw(rows: Sequence[RowResult], title: str, path: Path) -> bool:
    """Writes the picture; False where matplotlib is not installed, or no row trained anything."""
    shown = [row for row in rows if row.trainable > 0]
    if not shown or importlib.util.find_spec("matplotlib") is None:
        return False
    plot(shown, title).savefig(path, dpi=150)
    return True


def plot(rows: Sequence[RowResult], title: str) -> Any:
    """The figure: trained parameters of each row, above 0, against its score."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for group, colour in COLOURS.items():
        points = [(row.trainable, row.score) for row in rows if row.group == group]
        if points:
            across, up = zip(*points, strict=True)
            axes.scatter(across, up, s=22, color=colour, label=group, zorder=3)
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.1)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(f"{rows[0].main_metric} on the validation rows")
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.2)
    legend = axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.draw()  # places are known once it is laid out
    figure.set_layout_engine("none")
    taken = [legend.get_window_extent()]
    taken += [_around(axes.transData.transform((row.trainable, row.score))) for row in rows]
    for row in sorted(rows, key=lambda row: (row.trainable, row.score)):
        taken.append(_label(axes, row, taken))
    return figure


def _label(axes: Any, row: RowResult, taken: Iterable[Any]) -> Any:
    """Writes the row's id at the first place where it covers nothing; gives the box it takes."""
    text = None
    for dx, dy in PLACES:
        if text is not None:
            text.remove()
        text = axes.annotate(
            row.id,
            (row.trainable, row.score),
            (dx, dy),
            textcoords="offset points",
            ha="left" if dx > 0 else "right",
            va="center",
            fontsize=7,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "lw": 0.5, "shrinkA": 0, "shrinkB": 2},
        )
        box = label_box(text)
        inside = axes.bbox.padded(4)
        fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
        if fits and not any(box.overlaps(other) for other in taken):
            break
    assert text is not None
    return label_box(text)


def label_box(label: Any) -> Any:
    """Where a label's letters stand, in pixels: without the line to its point."""
    from matplotlib.text import Text

    label.update_positions(label.figure.canvas.get_renderer())
    return Text.get_window_extent(label)


def _around(place: Any) -> Any:
    from matplotlib.transforms import Bbox

    x, y = place
    return Bbox.from_extents(x - 3, y - 3, x + 3, y + 3)

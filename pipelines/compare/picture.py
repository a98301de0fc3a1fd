"""Score against trained parameters, a point a row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipelines.compare.rows import ALONE, COMBINED, MULTITASK
from pipelines.compare.scores import RowResult

COLOURS = {ALONE: "#5b8db8", MULTITASK: "#6a9955", COMBINED: "#d9772b"}
# Where a label may stand, in points from its point: near places first.
PLACES = [
    (dx, dy)
    for distance in (6, 16, 28, 42, 58, 76)
    for dx in (distance, -distance)
    for dy in (0, distance, -distance)
]


def draw(rows: Sequence[RowResult], title: str, path: Path) -> bool:
    """Writes the picture; False where matplotlib is not installed. Rows that train nothing have no place on it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = [row for row in rows if row.trainable > 0]
    if not shown:
        return False
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for group, colour in COLOURS.items():
        points = [(row.trainable, row.score) for row in shown if row.group == group]
        if points:
            axes.scatter(*zip(*points, strict=True), color=colour, label=group, zorder=3)
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.1)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(f"{shown[0].main_metric} on the validation rows")
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.2)
    legend = axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.draw()  # places are known once it is laid out
    figure.set_layout_engine("none")
    taken = [legend.get_window_extent()]
    taken += [_around(axes.transData.transform((row.trainable, row.score))) for row in shown]
    for row in sorted(shown, key=lambda row: (row.trainable, row.score)):
        taken.append(_label(axes, row, taken))
    figure.savefig(path, dpi=150)
    return True


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
            fontsize=7.5,
            arrowprops={"arrowstyle": "-", "color": "#aaaaaa", "lw": 0.6, "shrinkA": 1, "shrinkB": 3},
        )
        box = text.get_window_extent()
        inside = axes.bbox.padded(4)
        fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
        if fits and not any(box.overlaps(other) for other in taken):
            break
    assert text is not None
    return text.get_window_extent()


def _around(place: Any) -> Any:
    from matplotlib.transforms import Bbox

    x, y = place
    return Bbox.from_extents(x - 3, y - 3, x + 3, y + 3)

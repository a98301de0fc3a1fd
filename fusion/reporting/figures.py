"""The pictures: as files for a paper (PNG, SVG), and as SVG in the page, where they take on its colours."""

from __future__ import annotations

import contextlib
import html
import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.reporting.attention import Attention, Floats, by_target, layer_names
from fusion.reporting.contents import ablation
from fusion.reporting.curves import Curve
from fusion.reporting.results import Target
from fusion.reporting.wording import titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito's palette without its yellow, which white paper swallows; readable for the colour-blind.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#7f7f7f", "#8c564b")
# Nearly black: black in a file, and in the page replaced by the page's own colours of text and lines.
_INK, _FAINT = "#010203", "#7d7e80"
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold dollars
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextlib.contextmanager
def _drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, drawn in the report's style and without a window."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def colour_of(name: str, names: Sequence[str]) -> str:
    return PALETTE[list(names).index(name) % len(PALETTE)]


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """NAME.png and NAME.svg, on white."""
    import matplotlib

    paths = [folder / f"{name}.{ending}" for ending in ("png", "svg")]
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else {}
            figure.savefig(path, dpi=200, facecolor="white", metadata=metadata)
    return paths


def inline(figure: Figure, name: str, title: str) -> str:
    """The figure as an SVG element whose text and lines have the page's colours.

    Args:
        name: makes the element's inner names its own.
        title: says to those who cannot see it what it shows.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(_INK, "currentColor").replace(_FAINT, "var(--faint)")
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # which HTML does not need
    head = f'<svg class="figure" role="img" aria-label="{html.escape(title)}"'
    return re.sub(
        r'^<svg( width="[^"]*"| height="[^"]*")*',
        head,
        re.sub(r'(width|height)="[\d.]+pt" ?', "", svg, count=2),
    )


def noted(figure: Figure, lines: Sequence[str]) -> Figure:
    """The figure with lines of small text below it, such as which settings it shows."""
    if lines:
        most = int(18 * figure.get_figwidth())  # characters of 7 points
        text = "\n".join(part for line in lines for part in textwrap.wrap(line, most))
        figure.supxlabel(text, x=0.02, ha="left", fontsize=7, color=_INK)
    return figure


def scores_figure(targets: Sequence[Target]) -> Figure:
    """Each target's methods, a line for each of their settings: mean, one standard deviation, the seeds as ticks."""
    methods = list(dict.fromkeys(method for target in targets for method in target.groups))
    heights = [len(target.every_group) for target in targets]
    with _drawing(7.0, 0.55 + 0.26 * sum(heights) + 0.45 * len(targets)) as figure:
        panels = figure.subplots(len(targets), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, target in zip(panels, targets, strict=True):
            for place, group in enumerate(target.every_group):
                colour = colour_of(group.method, methods)
                axes.errorbar(
                    group.mean,
                    place,
                    xerr=group.deviation or 0,
                    fmt="o",
                    color=colour,
                    markersize=6,
                    capsize=3,
                )
                if len(group.scores) > 1:
                    axes.plot(
                        group.scores, [place] * len(group.scores), "|", color=colour, markersize=8, alpha=0.6
                    )
            names = [_cut(titled(group), 70) for group in target.every_group]
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_title(f"{target.label}: {target.metric} ({target.split})")
            axes.grid(axis="x", color=_FAINT, alpha=0.25)
        return figure


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def attention_figure(one: Attention) -> Figure:
    """Layers by rows, sources by columns, each cell its share."""
    return _heatmap(one.mean, layer_names(one.slots), one.sources, "layer", f"{one.target} ← {one.method}")


def by_target_figure(every: Sequence[Attention]) -> Figure:
    """Fusions by rows, sources by columns, for the mean over the layers and the first, middle and last of them."""
    count = max(len(one.slots) for one in every)
    panels = [("all layers", None), ("first", 0), ("middle", count // 2), ("last", count - 1)]
    rows, columns, _ = by_target(every)
    with _drawing(2.0 + 4 * (0.5 + 0.32 * len(columns)), 1.3 + 0.3 * len(rows)) as figure:
        for axes, (title, layer) in zip(figure.subplots(1, 4, sharey=True), panels, strict=True):
            _cells(axes, by_target(every, layer)[2], rows, columns, title)
        return figure


def _heatmap(values: Floats, rows: Sequence[str], columns: Sequence[str], ylabel: str, title: str) -> Figure:
    with _drawing(1.6 + 0.55 * len(columns), 1.2 + 0.27 * len(rows)) as figure:
        axes = figure.subplots()
        _cells(axes, values, rows, columns, title)
        axes.set_ylabel(ylabel)
        return figure


def _cells(axes: Any, values: Floats, rows: Sequence[str], columns: Sequence[str], title: str) -> None:
    largest = max(1e-9, float(np.nanmax(np.abs(values)))) if np.isfinite(values).any() else 1.0
    axes.pcolormesh(
        np.ma.masked_invalid(values), cmap="Blues", vmin=0, vmax=max(largest, 1e-9), rasterized=False
    )
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{value:.2f}".removeprefix("0") if 0 <= value < 1 else f"{value:.2f}"
            dark = value > 0.6 * largest
            axes.text(
                column + 0.5,
                row + 0.5,
                text,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "#222222",
            )
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title)


def entropy_figure(every: Sequence[Attention]) -> Figure:
    """How spread the attention is, layer by layer, as a share of what even attention would have."""
    with _drawing(4.2, 3.0) as figure:
        axes = figure.subplots()
        for number, one in enumerate(every):
            if one.entropy is None or one.most == 0:
                continue
            colour = PALETTE[number % len(PALETTE)]
            label = f"{one.target} ← {one.method}"
            axes.plot(
                np.arange(len(one.entropy)),
                one.entropy / one.most,
                "o-",
                color=colour,
                label=label,
                markersize=4,
            )
        axes.axhline(1.0, color=_FAINT, linestyle=":", linewidth=1)
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("slot, from the first layer (0) to the last")
        axes.set_ylabel("entropy, mean over tokens / even")
        axes.legend(fontsize=7, loc="lower left")
        return figure


def pruning_figure(inspection: dict[str, Any], stacked: bool = False) -> Figure:
    """The change without each source, with its interval over the rows; the score against the number of kept sources.

    Args:
        stacked: one panel below the other, as narrow as a phone; else side by side.
    """
    metric = next(iter(inspection["metrics"]))
    changes = ablation(inspection, metric)
    steps = inspection.get("pruned") or []
    height = 1.2 + 0.26 * max(len(changes), 3)
    with _drawing(3.7 if stacked else 7.0, height + 2.2 if stacked else max(height, 2.5)) as figure:
        if stacked:
            left, right = figure.subplots(2, 1, height_ratios=(height, 2.2))
        else:
            left, right = figure.subplots(1, 2)
        for place, change in enumerate(changes.values()):
            colour = _FAINT
            if change.conclusive:
                colour = "#d55e00" if change.mean < 0 else "#009e73"
            if change.low is not None and change.high is not None:
                left.plot([change.low, change.high], [place, place], color=_INK, linewidth=1)
            left.barh(place, change.mean, color=colour, zorder=0)
        left.set_yticks(range(len(changes)), [_cut(name, 22) for name in changes])
        left.axvline(0, color=_FAINT, linewidth=0.8)
        left.invert_yaxis()
        left.set_title(f"change of {metric} without it")
        if not any(change.mean or change.low or change.high for change in changes.values()):
            left.set_xlim(-0.01, 0.01)
        left.locator_params(axis="x", nbins=4)
        left.grid(axis="x", color=_FAINT, alpha=0.25)
        if steps:
            counts = [len(step["kept"]) for step in steps]
            right.plot(
                counts, [step["metrics"][metric] for step in steps], "o-", color=PALETTE[0], markersize=4
            )
            right.set_xticks(counts)
            right.invert_xaxis()
        right.set_xlabel("sources kept")
        right.set_title(f"{metric}, least needed removed first")
        right.grid(axis="y", color=_FAINT, alpha=0.25)
        return figure


def curves_figure(curves: dict[str, list[Curve]], methods: Sequence[str], columns: int = 2) -> Figure:
    """A panel for each metric; a band from the lowest to the highest seed."""
    columns = min(len(curves), columns)
    lines = -(-len(curves) // columns)
    with _drawing(3.5 * columns + 0.2, 2.4 * lines + 0.3) as figure:
        panels = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes, (metric, of_metric) in zip(panels, curves.items(), strict=False):
            for curve in of_metric:
                colour = colour_of(curve.method, methods)
                marker = "o" if len(curve.steps) < 15 else None
                axes.plot(
                    curve.steps,
                    curve.mean,
                    color=colour,
                    label=curve.method,
                    marker=marker,
                    markersize=3,
                    linewidth=1.2,
                )
                if curve.seeds > 1:
                    axes.fill_between(
                        curve.steps, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0
                    )
            axes.set_title(metric)
            axes.set_xlabel("step")
            axes.grid(color=_FAINT, alpha=0.2)
        for axes in panels[len(curves) :]:
            axes.set_visible(False)
        panels[0].legend(fontsize=7)
        return figure


def cost_figure(target: Target, rows: Sequence[dict[str, Any]], stacked: bool = False) -> Figure:
    """The score against what trains and against how long it took. `stacked`: as of `pruning_figure`."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    methods = [row["method"] for row in rows]
    size = (3.7, 4.6 + 0.17 * len(rows)) if stacked else (7.4, max(2.8, 0.6 + 0.18 * len(rows)))
    with _drawing(*size) as figure:
        panels = figure.subplots(2, 1, sharey=True) if stacked else figure.subplots(1, 2, sharey=True)
        for axes, (key, label) in zip(
            panels,
            (("parameters", "parameters that train"), ("seconds", "seconds of training")),
            strict=True,
        ):
            for row in rows:
                if row.get(key):
                    place = methods.index(row["method"])
                    colour, marker = PALETTE[place % len(PALETTE)], "os^D"[place // len(PALETTE) % 4]
                    axes.plot(
                        row[key],
                        row["score"],
                        marker,
                        color=colour,
                        markersize=7,
                        label=_cut(row["method"], 50),
                    )
            if any(row.get(key) for row in rows):
                axes.set_xscale("log")
                values = [row[key] for row in rows if row.get(key)]
                wide = max(values) / min(values) > 100
                axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0), numticks=6))
                axes.xaxis.set_major_formatter(FuncFormatter(_count))
                axes.xaxis.set_minor_locator(NullLocator())
            axes.margins(x=0.15, y=0.2)
            axes.set_xlabel(label)
            axes.grid(color=_FAINT, alpha=0.2)
        for axes in figure.axes if stacked else figure.axes[:1]:
            axes.set_ylabel(target.metric)
        figure.suptitle(target.label, x=0.02, ha="left", fontsize=10)
        named = {
            text: handle
            for axes in figure.axes
            for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if named:
            where: Any = "outside lower left" if stacked else "outside right center"
            figure.legend(list(named.values()), list(named), loc=where, fontsize=7)
        return figure


def _count(value: float, position: int | None = None) -> str:
    """1000 as 1 k, 3000000 as 3 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"

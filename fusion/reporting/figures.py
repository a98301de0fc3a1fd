"""Figures of the report, saved as PNG and SVG, or embedded in the page as SVG in the page's colors."""

from __future__ import annotations

import contextlib
import html
import io
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.reporting.records import Attention, by_target
from fusion.reporting.statistics import Difference, Floats
from fusion.text import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from fusion.reporting.errors import Errors

_WIDTH = 3.7  # inches: a column of a paper, or a phone
# Color-blind safe palette of Okabe & Ito, without its yellow, which is too light on white.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#7f7f7f", "#8c564b")
# Placeholders, replaced in the page by its own text and line colors.
_INK, _FAINT = "#010203", "#7d7e80"
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "text.parse_math": False,  # names may contain dollars
    "font.size": 9,
    "svg.fonttype": "none",
    "axes.edgecolor": _FAINT,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}


@contextlib.contextmanager
def _drawing(width: float, height: float) -> Iterator[Figure]:
    """Create a figure of a size in inches, in the report's style and without pyplot."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def color(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Save a figure as NAME.png and NAME.svg on a white background."""
    paths = [folder / f"{name}.{ending}" for ending in ("png", "svg")]
    for path in paths:
        _render(figure, path, name, path.suffix[1:], facecolor="white")
    return paths


def _render(figure: Figure, to: Path | io.StringIO, name: str, format: str, **options: Any) -> None:
    """Render a figure reproducibly: equal figures give equal bytes."""
    import matplotlib

    metadata = {"Date": None} if format == "svg" else {}
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs missing in the font
        figure.savefig(to, format=format, dpi=200, metadata=metadata, **options)


def inline(figure: Figure, name: str, title: str) -> str:
    """Return the figure as an SVG element in the page's colors. `name`: prefix of its ids; `title`: its description."""
    buffer = io.StringIO()
    _render(figure, buffer, name, "svg")
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    svg = svg.replace(_INK, "currentColor").replace(_FAINT, "var(--faint)")
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # not needed in HTML
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg", f'<svg class="figure" role="img" aria-label="{html.escape(title)}"', 1)


def noted(figure: Figure, lines: Sequence[str]) -> Figure:
    """Add lines of small text below a figure."""
    if lines:
        most = int(18 * figure.get_figwidth())  # characters per line at 7 points
        text = "\n".join(part for line in lines for part in textwrap.wrap(line, most))
        figure.supxlabel(text, x=0.02, ha="left", fontsize=7, color=_INK)
    return figure


def scores_figure(panels: Mapping[str, Mapping[str, tuple[str, Sequence[float]]]]) -> Figure:
    """Plot mean, standard deviation and single scores. `panels`: method and scores by panel title and line label."""
    methods = list(dict.fromkeys(method for lines in panels.values() for method, _ in lines.values()))
    heights = [len(lines) for lines in panels.values()]
    with _drawing(7.0, 0.55 + 0.26 * sum(heights) + 0.45 * len(panels)) as figure:
        every = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, lines) in zip(every, panels.items(), strict=True):
            for place, (method, scores) in enumerate(lines.values()):
                ink, spread = color(methods.index(method)), np.std(scores, ddof=1) if len(scores) > 1 else 0
                axes.errorbar(np.mean(scores), place, xerr=spread, fmt="o", markersize=6, capsize=3, color=ink)
                if len(scores) > 1:
                    axes.plot(scores, [place] * len(scores), "|", markersize=8, alpha=0.6, color=ink)
                else:
                    offset: dict[str, Any] = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
                    axes.annotate(f"{scores[0]:.3f}", (scores[0], place), **offset)
            axes.set_yticks(range(len(lines)), [shortened(label, 70) for label in lines])
            axes.set_ylim(len(lines) - 0.5, -0.5)
            axes.set_title(textwrap.fill(title, 64))
            axes.margins(x=0.12)  # space for the numbers
            axes.grid(axis="x", color=_FAINT, alpha=0.25)
        return figure


def differences_figure(
    panels: Mapping[str, Mapping[str, Sequence[tuple[str, float, float | None, float | None]]]], xlabel: str
) -> Figure:
    """Plot differences with intervals. `panels`: (label, mean, low, high) by panel title and method."""
    methods = list(dict.fromkeys(method for panel in panels.values() for method in panel))
    labels = [list(dict.fromkeys(one[0] for own in panel.values() for one in own)) for panel in panels.values()]
    heights = [len(each) * (0.16 * len(methods) + 0.12) for each in labels]
    with _drawing(7.0, 0.9 + sum(heights) + 0.35 * len(panels) + 0.2 * len(methods)) as figure:
        every = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, panel), rows in zip(every, panels.items(), labels, strict=True):
            for number, method in enumerate(methods):
                shift = 0.8 * ((number + 0.5) / len(methods) - 0.5)
                for label, mean, low, high in panel.get(method, ()):
                    place, ink = rows.index(label) + shift, color(number)
                    if low is not None and high is not None:
                        axes.plot([low, high], [place, place], color=ink, linewidth=1.2)
                    axes.plot([mean], [place], "o", color=ink, markersize=4)
            axes.set_yticks(range(len(rows)), [shortened(label, 30) for label in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.axvline(0, color=_FAINT, linewidth=0.8)
            axes.grid(axis="x", color=_FAINT, alpha=0.25)
            axes.set_title(title)
        every[-1].set_xlabel(xlabel)
        for number, method in enumerate(methods):
            every[-1].plot([], [], "o", color=color(number), markersize=4, label=method)
        figure.legend(*every[-1].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return figure


def heatmap_figure(values: Floats, rows: Sequence[str], columns: Sequence[str], ylabel: str, title: str) -> Figure:
    """Plot `values`, (rows, columns), as a heatmap. NaN cells are left empty."""
    with _drawing(1.6 + 0.55 * len(columns), 1.2 + 0.27 * len(rows)) as figure:
        axes = figure.subplots()
        _cells(axes, values, rows, columns, title)
        axes.set_ylabel(ylabel)
        return figure


def attention_figure(record: Mapping[str, Any]) -> Figure:
    """Plot the mean weights by slot and source of a record of attention.jsonl."""
    weights = np.array([slot["mean"] for slot in record["slots"].values()], dtype=float)
    title = f"epoch {record['epoch']}, step {record['step']}"
    figure = heatmap_figure(weights, list(record["slots"]), record["sources"], "slot", title)
    figure.set_facecolor("white")
    return figure


def confusion_figure(errors: Errors, title: str) -> Figure:
    """Plot the confusion matrix: the fractions of the examples of each class (row)."""
    classes = errors.classes
    labels = [f"{name} ({count:,})" for name, count in zip(classes.names, classes.count, strict=True)]
    figure = heatmap_figure(errors.confusion, labels, classes.names, "label (examples)", "")
    (axes,) = figure.axes
    axes.set_xlabel("prediction")
    axes.set_title(textwrap.fill(title, int(8 * figure.get_figwidth())))
    return figure


def by_target_figure(every: Sequence[Attention]) -> Figure:
    """Plot fusions × sources for the mean over the layers, and for the first, middle and last layer."""
    count = max(len(one.slots) for one in every)
    panels = [("all layers", None), ("first", 0), ("middle", count // 2), ("last", count - 1)]
    rows, columns, _ = by_target(every)
    with _drawing(2.0 + 4 * (0.5 + 0.32 * len(columns)), 1.3 + 0.3 * len(rows)) as figure:
        for axes, (title, layer) in zip(figure.subplots(1, 4, sharey=True), panels, strict=True):
            _cells(axes, by_target(every, layer)[2], rows, columns, title)
        return figure


def _cells(axes: Any, values: Floats, rows: Sequence[str], columns: Sequence[str], title: str) -> None:
    largest = max(1e-9, float(np.nanmax(np.abs(values)))) if np.isfinite(values).any() else 1.0
    axes.pcolormesh(np.ma.masked_invalid(values), cmap="Blues", vmin=0, vmax=largest)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{value:.2f}".removeprefix("0") if 0 <= value < 1 else f"{value:.2f}"
            ink = "white" if value > 0.6 * largest else "#222222"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, color=ink)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title)


def entropy_figure(every: Sequence[Attention]) -> Figure:
    """Plot the attention entropy by layer, relative to uniform attention."""
    with _drawing(4.2, 3.0) as figure:
        axes = figure.subplots()
        for number, one in enumerate(every):
            if one.entropy is not None and one.max_entropy > 0:
                relative = one.entropy / one.max_entropy
                axes.plot(relative, "o-", color=color(number), label=one.title, markersize=4)
        axes.axhline(1.0, color=_FAINT, linestyle=":", linewidth=1)
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("slot (0: first layer)")
        axes.set_ylabel("mean entropy / uniform entropy")
        axes.legend(fontsize=7, loc="lower left")
        return figure


def ablation_figure(metric: str, changes: Mapping[str, Difference], steps: Sequence[tuple[int, float]]) -> Figure:
    """Plot the change without each source with its interval, and the score by number of remaining sources."""
    height = 1.2 + 0.26 * max(len(changes), 3)
    with _drawing(_WIDTH, height + 2.2) as figure:
        bars, curve = figure.subplots(2, height_ratios=(height, 2.2))
        for place, change in enumerate(changes.values()):
            sign = "#d55e00" if change.mean < 0 else "#009e73"
            bars.barh(place, change.mean, color=sign if change.conclusive else _FAINT, zorder=0)
            if change.low is not None and change.high is not None:
                bars.plot([change.low, change.high], [place, place], color=_INK, linewidth=1)
        bars.set_yticks(range(len(changes)), [shortened(name, 22) for name in changes])
        bars.axvline(0, color=_FAINT, linewidth=0.8)
        bars.invert_yaxis()
        bars.set_title(f"change of {metric} without each source")
        if not any(change.mean or change.low or change.high for change in changes.values()):
            bars.set_xlim(-0.01, 0.01)
        bars.locator_params(axis="x", nbins=4)
        bars.grid(axis="x", color=_FAINT, alpha=0.25)
        if steps:
            counts, scores = zip(*steps, strict=True)
            curve.plot(counts, scores, "o-", color=PALETTE[0], markersize=4)
            curve.set_xticks(counts)
            curve.invert_xaxis()
        curve.set_xlabel("number of sources")
        curve.set_title(textwrap.fill(f"{metric}, least important source removed first", 40))
        curve.grid(axis="y", color=_FAINT, alpha=0.25)
        return figure


def curves_figure(curves: Mapping[str, Mapping[str, DataFrame]], methods: Sequence[str]) -> Figure:
    """Plot a panel for each metric of `curves_of`, with a band between the minimum and maximum over seeds."""
    with _drawing(_WIDTH, 2.4 * len(curves) + 0.3) as figure:
        panels = figure.subplots(len(curves), squeeze=False)[:, 0]
        for axes, (metric, of_metric) in zip(panels, curves.items(), strict=True):
            for method, curve in of_metric.items():
                ink = color(methods.index(method))
                marker = "o" if len(curve) < 15 else None
                axes.plot(curve["mean"], color=ink, label=method, marker=marker, markersize=3, linewidth=1.2)
                if curve["count"].max() > 1:
                    axes.fill_between(curve.index, curve["min"], curve["max"], color=ink, alpha=0.18, lw=0)
            axes.set_title(metric)
            axes.set_xlabel("step")
            axes.grid(color=_FAINT, alpha=0.2)
        panels[0].legend(fontsize=7)
        return figure


def reliability_figure(every: Mapping[str, Sequence[Sequence[float]]], title: str) -> Figure:
    """Plot the accuracy against the confidence of the bins of each method: (confidence, accuracy, size)."""
    with _drawing(_WIDTH, 3.6) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=_FAINT, linestyle=":", linewidth=1)
        for number, (method, bins) in enumerate(every.items()):
            confidence, accuracy, size = np.array(bins).T
            axes.plot(confidence, accuracy, color=color(number), linewidth=1, label=shortened(method, 50))
            axes.scatter(confidence, accuracy, s=8 + 60 * size / size.sum(), color=color(number))
        lowest = min(one[0] for bins in every.values() for one in bins)
        axes.set_xlim(max(0.0, lowest - 0.05), 1.01)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        axes.set_title(textwrap.fill(title, 50))
        axes.grid(color=_FAINT, alpha=0.2)
        axes.legend(fontsize=7, loc="upper left")
        return figure


def by_labels_figure(methods: Mapping[str, Sequence[tuple[int, Sequence[float]]]], title: str) -> Figure:
    """Plot mean and standard deviation of each method's scores against the number of training examples."""
    with _drawing(_WIDTH, 3.6) as figure:
        axes = figure.subplots()
        for number, (method, points) in enumerate(methods.items()):
            rows = [rows for rows, _ in points]
            spread = [float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0 for _, scores in points]
            means = [float(np.mean(scores)) for _, scores in points]
            label = shortened(method, 50)
            axes.errorbar(rows, means, spread, fmt="o-", markersize=4, capsize=3, color=color(number), label=label)
        _log_axis(axes, [rows for points in methods.values() for rows, _ in points])
        axes.margins(x=0.12)
        axes.set_xlabel("training examples")
        axes.set_title(textwrap.fill(title, 50))
        axes.grid(color=_FAINT, alpha=0.2)
        axes.legend(fontsize=7)
        return figure


def cost_figure(rows: Sequence[Mapping[str, Any]], title: str, metric: str) -> Figure:
    """Plot `score` against `parameters` and `seconds`, where known, for the `method` of each row."""
    with _drawing(_WIDTH, 4.6 + 0.17 * len(rows)) as figure:
        panels = figure.subplots(2, sharey=True)
        handles: dict[str, Any] = {}
        labels = {"parameters": "trainable parameters", "seconds": "training time (s)"}
        for axes, (key, label) in zip(panels, labels.items(), strict=True):
            for place, row in enumerate(rows):
                if row.get(key):
                    marker = "os^Dv"[place // len(PALETTE) % 5]
                    (handle,) = axes.plot(row[key], row["score"], marker, color=color(place), markersize=7)
                    handles.setdefault(shortened(row["method"], 50), handle)
            _log_axis(axes, [row[key] for row in rows if row.get(key)])
            axes.margins(x=0.15, y=0.2)
            axes.set_xlabel(label)
            axes.set_ylabel(metric)
            axes.grid(color=_FAINT, alpha=0.2)
        figure.suptitle(title, x=0.02, ha="left", fontsize=10)
        if handles:
            figure.legend(list(handles.values()), list(handles), loc="outside lower left", fontsize=7)
        return figure


def _log_axis(axes: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    if values:
        wide = max(values) / min(values) > 100
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0), numticks=6))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.xaxis.set_minor_locator(NullLocator())

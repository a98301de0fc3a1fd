"""Contents of the report: figures, and tables as DataFrames (CSV with full precision, LaTeX with booktabs)."""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fusion.reporting import figures
from fusion.reporting.errors import MOST_CLASSES, Errors, by_labels, errors_of
from fusion.reporting.reading import Found
from fusion.reporting.records import (
    Attention,
    ablation,
    attention_of,
    layer_names,
    shown_curves,
    slider_positions,
    unpack,
)
from fusion.reporting.scores import Trained
from fusion.reporting.targets import BASELINE, Group, Target, every_method
from fusion.reporting.wording import anchor, file_name, mean_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_LATEX = {"±": r"$\pm$", "−": r"$-$", "←": r"$\leftarrow$", "·": r"$\cdot$", "<": r"$<$", ">": r"$>$"}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would evaluate a string that starts with these
# Column names of the CSV files.
DIFFERENCES = (
    *("target", "method", "settings", "seeds", "mean", "sd", "difference", "low", "high", "p", "p (Holm)"),
    *("wins", "ties", "losses", "over", "not at equal budget", "pairs"),
)
ABLATION = (
    *("target", "method", "artifact", "source", "metric", "with it", "without it", "change", "low", "high"),
    "setting",
)
# Keys of `costs`: section and key in result.json, and column of the CSV file.
_COSTS = {
    "parameters": ("parameters", "trainable", "trainable parameters"),
    "bytes": ("parameters", "stored_bytes", "stored bytes"),
    "seconds": ("speed", "seconds", "seconds"),
    "tokens": ("speed", "tokens_per_second", "tokens per second"),
    "memory": ("speed", "peak_memory_bytes", "peak memory bytes"),
    "energy": ("speed", "energy_joules", "energy (J)"),
}


class Contents:
    def __init__(self, found: Found, targets: Sequence[Target], notes: Sequence[str] = ()) -> None:
        self.found, self.notes = found, list(notes)
        several = [target for target in targets if len(target.every_group) > 1]
        self.targets = several or list(targets)  # those with more than one method, if any
        self.single = [target for target in targets if several and len(target.every_group) == 1]
        self.everything = [*self.targets, *self.single]
        self.attention = attention_of(self.everything, found)

    @functools.cached_property
    def errors(self) -> dict[str, dict[str, Errors]]:
        """Errors by target and method, for targets with classes and stored predictions."""
        found = {target.label: errors_of(target) for target in self.everything}
        return {label: errors for label, errors in found.items() if errors}

    @functools.cached_property
    def by_labels(self) -> dict[str, dict[str, list[tuple[int, list[float]]]]]:
        return by_labels(self.everything)

    @functools.cached_property
    def inspected(self) -> list[dict[str, Any]]:
        """The first inspected run of each method of each target, see `inspected`."""
        seen: list[dict[str, Any]] = []
        for target in self.everything:
            for group in target.groups.values():
                if group.anywhere:
                    continue  # inspected on a different task
                inspections = ((one, self.found.inspections.get(one.hash or "")) for one in group.trained)
                complete = (made for one, i in inspections if i and (made := inspected(target, group, one, i)))
                seen += itertools.islice(complete, 1)
        return seen

    @functools.cached_property
    def figures(self) -> dict[tuple[str, ...], tuple[str, Figure]]:
        """Titles and figures by (plot type, target, method), which also form the file name."""
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
        for title, methods in self.by_labels.items():
            add(
                "labels",
                title,
                title=f"Score by training examples, {title}",
                figure=figures.by_labels_figure(methods, title),
            )
        for target in self.everything:
            errors = self.errors.get(target.label, {})
            for method, own in errors.items():
                if len(own.classes.names) <= MOST_CLASSES:
                    title, setting = f"{target.label}, {method}", target.groups[method].setting
                    figure = figures.confusion_figure(own, title)
                    settings = [setting] if setting else []
                    add("confusion", target.label, method, title=title, figure=figure, settings=settings)
            if bins := {method: own.bins for method, own in errors.items() if own.bins}:
                title = f"Confidence and accuracy, {target.label}"
                add("reliability", target.label, title=title, figure=figures.reliability_figure(bins, title))
        for one in self.attention:
            figure = figures.heatmap_figure(one.mean, layer_names(one.slots), one.sources, "layer", one.title)
            settings = [one.setting] if one.setting else []
            add("attention", one.target, one.method, title=one.title, figure=figure, settings=settings)
        settings = [f"{one.title}: {one.setting}" for one in self.attention if one.setting]
        if self.attention:
            figure = figures.by_target_figure(self.attention)
            add("attention-by-target", title="Sources by target", figure=figure, settings=settings)
        if any(one.entropy is not None for one in self.attention):
            title = "Attention entropy per layer, averaged over tokens, relative to uniform attention"
            add("entropy", title=title, figure=figures.entropy_figure(self.attention), settings=settings)
        for seen in self.inspected:
            if seen["changes"]:
                steps = [(len(kept), score) for kept, score in seen["pruned"]]
                figure = figures.ablation_figure(seen["metric"], seen["changes"], steps)
                title = f"Source ablation and pruning, {seen['target']}"
                settings = [f"{seen['method']}: {seen['setting']}"] if seen["setting"] else []
                add("needed", seen["target"], seen["method"], title=title, figure=figure, settings=settings)
        for target in self.everything:
            if curves := shown_curves(target, self.found):
                figure = figures.curves_figure(curves, list(target.groups))
                settings = target.settings([name for metric in curves.values() for name in metric])
                title = f"{', '.join(curves)} by training step, {target.label}"
                add("curves", target.label, title=title, figure=figure, settings=settings)
            figure = figures.cost_figure(costs(target), target.label, target.metric)
            add("cost", target.label, title=f"Score vs. parameters and training time, {target.label}", figure=figure)
        return made


def inspected(target: Target, group: Group, trained: Trained, inspection: dict[str, Any]) -> dict[str, Any] | None:
    """Return the token-level attention, source ablation and pruning of a fusion, or `None` if a value is missing."""
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        (metric, full), *_ = inspection["metrics"].items()
        sources, slots = (list(map(str, inspection[key])) for key in ("sources", "slots"))
        colors = [figures.color(n) for n in range(len(sources))]
        return {
            "id": anchor("into", target.label, group.method),
            "target": target.label,
            "method": group.method,
            "title": f"{target.label} ← {group.method}",
            "name": trained.name,
            "setting": group.setting,
            "split": inspection["split"],
            "count": inspection["rows"],
            "metric": metric,
            "full": float(full),
            "sources": list(zip(sources, colors, strict=True)),
            "layers": slider_positions(slots),
            "rows": [_tokens(row, len(slots), colors) for row in inspection["words"]],
            "changes": ablation(inspection, metric),
            "without": {source: one["metrics"][metric] for source, one in inspection["masked"].items()},
            "pruned": [(step["kept"], float(step["metrics"][metric])) for step in inspection["pruned"] or []],
        }
    return None


def _tokens(row: dict[str, Any], slots: int, colors: Sequence[str]) -> dict[str, Any]:
    """Return an example, with the source of the largest mean weight over slots for each token."""
    tokens = list(map(str, row["tokens"]))
    mean = unpack(row["weights"], (slots, len(tokens), len(colors))).mean(0)
    return {key: row[key] for key in ("row", "predicted", "truth", "right", "weights")} | {
        "tokens": [
            {
                "text": token.strip() or token,
                "starts_word": token.startswith(" "),
                "special": place in row["special"],
                "color": colors[weights.argmax()],
                "weight": round(100 * float(weights.max())),
            }
            for place, (token, weights) in enumerate(zip(tokens, mean, strict=True))
        ]
    }


def costs(target: Target) -> list[dict[str, Any]]:
    """Return the score and mean cost of each group that was trained on the target."""
    rows = []
    for group in target.every_group:
        if not group.anywhere:
            results = [trained.run.result for trained in group.trained]
            means = {name: _mean(results, part, key) for name, (part, key, _) in _COSTS.items()}
            rows.append({"method": group.title, "score": group.mean, **means})
    return rows


def _mean(results: Sequence[Mapping[str, Any]], part: str, key: str) -> float | None:
    values = [(result.get(part) or {}).get(key) for result in results]
    numbers = [float(value) for value in values if isinstance(value, (int, float))]
    return sum(numbers) / len(numbers) if numbers else None


class Table(NamedTuple):
    name: str
    caption: str
    frame: DataFrame
    shown: DataFrame | None = None  # formatted values, if they differ


def table(name: str, caption: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    import pandas as pd

    return Table(name, caption, pd.DataFrame(list(rows), columns=list(header), dtype=object))


def save_table(one: Table, folder: Path) -> list[Path]:
    """Write NAME.csv and NAME.tex."""
    paths = [folder / f"{one.name}.csv", folder / f"{one.name}.tex"]
    cells = [[_escape_formula(cell) for cell in row] for row in one.frame.itertuples(index=False)]
    table("", "", one.frame.columns, cells).frame.to_csv(paths[0], index=False, lineterminator="\r\n")
    paths[1].write_text(latex(one), encoding="utf-8")
    return paths


def latex(one: Table) -> str:
    """Format a table as LaTeX; requires \\usepackage{booktabs}."""
    frame = (one.frame if one.shown is None else one.shown).map(_cell)
    columns = "l" + "r" * (frame.shape[1] - 1)
    text = frame.to_latex(index=False, escape=True, column_format=columns)
    for character, code in _LATEX.items():
        text = text.replace(character, code)
    return f"% {' '.join(one.caption.split())}\n{text}"


def _cell(value: Any) -> str:
    if value is None:
        return "--"
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def _escape_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def tables_of(contents: Contents) -> list[Table]:
    targets, methods = contents.everything, every_method(contents.everything)
    chosen = [f"{one.label}, {line}" for one in targets for line in one.settings(methods)]
    caption = "; ".join(["Mean and standard deviation over seeds", *chosen])
    header = ("target", "metric", "split", *methods)
    means, shown = ([], [])
    for one in targets:
        of = [one.groups[method].scores if method in one.groups else None for method in methods]
        means.append([one.label, one.metric, one.split, *(scores and statistics.fmean(scores) for scores in of)])
        shown.append([one.label, one.metric, one.split, *(scores and mean_of(scores) for scores in of)])
    return [
        Table("scores", caption, table("", "", header, means).frame, table("", "", header, shown).frame),
        table(
            "differences",
            f"Differences from the {BASELINE}",
            DIFFERENCES,
            (_difference(target, group) for target in contents.targets for group in target.every_group),
        ),
        table(
            "metrics",
            "All metrics, means over seeds",
            ("target", "split", "method", "settings", "seeds", "metric", "mean", "sd"),
            (row for target in targets for row in _metrics(target)),
        ),
        *_of_errors(contents),
        *map(_attention, contents.attention),
        table(
            "needed",
            "Score without each source (source ablation), without further training",
            ABLATION,
            (row for one in contents.inspected for row in _ablation(one)),
        ),
        table(
            "cost",
            "Cost, means over seeds",
            ("target", "method", "score", *(title for *_, title in _COSTS.values())),
            ([one.label, *row.values()] for one in targets for row in costs(one)),
        ),
    ]


def _of_errors(contents: Contents) -> list[Table]:
    """Return the tables of errors that are not empty."""
    every = [
        table(
            "classes",
            "Scores per class, means over seeds",
            ("target", "method", "class", "precision", "recall", "F1", "examples"),
            ([*names, *row] for names, one in _each(contents.errors) for row in _classes(one)),
        ),
        table(
            "calibration",
            "Calibration: mean confidence and accuracy by interval of confidence, and expected calibration error (ECE)",
            ("target", "method", "ECE", "confidence", "accuracy", "predictions"),
            ([*names, one.ece, *bin] for names, one in _each(contents.errors) for bin in one.bins),
        ),
        table(
            "labels",
            "Scores by number of training examples, means over seeds",
            ("target", "method", "training examples", "seeds", "mean", "sd"),
            (row for title, methods in contents.by_labels.items() for row in _by_labels(title, methods)),
        ),
    ]
    return [one for one in every if len(one.frame)]


def _difference(target: Target, group: Group) -> list[Any]:
    start = [target.label, group.method, group.differing, len(group.scores), group.mean, group.deviation]
    unequal, d = "; ".join(group.unequal), group.difference
    if d is None:
        return [*start, *[None] * 9, unequal, None]
    return [*start, d.mean, d.low, d.high, d.p, group.adjusted, d.wins, d.ties, d.losses, d.unit, unequal, d.pairs]


def _each(errors: Mapping[str, Mapping[str, Errors]]) -> Iterable[tuple[tuple[str, str], Errors]]:
    """Yield target and method, and their errors."""
    return (((label, method), own) for label, of in errors.items() for method, own in of.items())


def _classes(one: Errors) -> Iterable[tuple[Any, ...]]:
    scores = one.classes
    columns = (values.tolist() for values in (scores.precision, scores.recall, scores.f1, scores.count))
    return zip(scores.names, *columns, strict=True)


def _by_labels(title: str, methods: Mapping[str, Sequence[tuple[int, Sequence[float]]]]) -> Iterable[list[Any]]:
    for method, points in methods.items():
        for rows, scores in points:
            deviation = statistics.stdev(scores) if len(scores) > 1 else None
            yield [title, method, rows, len(scores), statistics.fmean(scores), deviation]


def _metrics(target: Target) -> Iterable[list[Any]]:
    for group in target.every_group:
        for metric in target.metrics:
            if values := group.scores_by(metric):
                deviation = statistics.stdev(values) if len(values) > 1 else None
                names = [target.label, target.split, group.method, group.differing]
                yield [*names, len(values), metric, statistics.fmean(values), deviation]
    for metric, value in target.constant.items():
        yield [target.label, target.split, target.majority, "", None, metric, value, None]


def _attention(one: Attention) -> Table:
    setting = f", {one.setting}" if one.setting else ""
    caption = f"Mean attention, {one.target} <- {one.method}, {one.runs} runs{setting}"
    entropies = [None] * len(one.mean) if one.entropy is None else one.entropy.tolist()
    rows = zip(layer_names(one.slots), one.mean.tolist(), entropies, strict=True)
    values = ([layer, *weights, entropy] for layer, weights, entropy in rows)
    name = file_name("attention", one.target, one.method)
    return table(name, caption, ("layer", *one.sources, "entropy"), values)


def _ablation(seen: dict[str, Any]) -> Iterable[list[Any]]:
    for source, change in seen["changes"].items():
        names = [seen["target"], seen["method"], seen["name"], source, seen["metric"]]
        scores = [seen["full"], seen["without"][source], seen["without"][source] - seen["full"]]
        yield [*names, *scores, change.low, change.high, seen["setting"]]

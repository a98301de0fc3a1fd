"""The tables of the page as data frames, written as CSV with every digit and as LaTeX with booktabs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.reporting.ablation import ablation
from fusion.reporting.attention import Attention, layer_names
from fusion.reporting.contents import Contents, costs, every_method
from fusion.reporting.results import BASELINE, Group, Target
from fusion.reporting.statistics import Difference
from fusion.reporting.wording import chosen_setting, chosen_settings, file_name, score

if TYPE_CHECKING:
    from pandas import DataFrame

_LATEX = {"±": r"$\pm$", "−": r"$-$", "←": r"$\leftarrow$", "·": r"$\cdot$", "<": r"$<$", ">": r"$>$"}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would evaluate a text with such a prefix
_COST = {
    "parameters that train": "parameters",
    "stored bytes": "bytes",
    "seconds": "seconds",
    "tokens per second": "tokens",
    "peak memory bytes": "memory",
    "energy (J)": "energy",
}
# Column names of the files.
DIFFERENCES = (
    *("target", "method", "settings", "seeds", "mean", "sd", "difference", "low", "high", "p", "p (Holm)"),
    *("wins", "ties", "losses", "over", "not at equal budget", "pairs"),
)
ABLATION = (
    *("target", "method", "artifact", "source", "metric", "with it", "without it", "change", "low", "high"),
    "setting",
)
_DIFFERENCE = ("mean", "low", "high", "p", "adjusted", "wins", "ties", "losses", "unit")


@dataclass(frozen=True)
class Table:
    """shown: the same for a reader, where that differs."""

    name: str
    caption: str
    frame: DataFrame
    shown: DataFrame | None = None


def table(name: str, caption: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    import pandas as pd

    return Table(name, caption, pd.DataFrame(list(rows), columns=list(header), dtype=object))


def save(one: Table, folder: Path) -> list[Path]:
    """NAME.csv and NAME.tex."""
    paths = [folder / f"{one.name}.csv", folder / f"{one.name}.tex"]
    cells = [[_escape_formula(cell) for cell in row] for row in one.frame.itertuples(index=False)]
    table("", "", one.frame.columns, cells).frame.to_csv(paths[0], index=False, lineterminator="\r\n")
    paths[1].write_text(latex(one), encoding="utf-8")
    return paths


def latex(one: Table) -> str:
    """The first column left-aligned, the others right-aligned; needs \\usepackage{booktabs}."""
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
    """Every table of the page."""
    targets = contents.everything
    settings = f"; {'; '.join(lines)}" if (lines := _chosen(targets)) else ""
    caption = f"Mean and standard deviation over the seeds{settings}"
    header = ("target", "metric", "split", *every_method(targets))
    scores = table("scores", caption, header, (_scores(one, header[3:], lambda g: g.mean) for one in targets))
    shown = table("scores", caption, header, (_scores(one, header[3:], score) for one in targets)).frame
    groups = [(target, group) for target in contents.targets for group in target.every_group]
    return [
        Table("scores", caption, scores.frame, shown),
        table(
            "differences",
            f"Differences to the {BASELINE}",
            DIFFERENCES,
            (_difference(target, group) for target, group in groups),
        ),
        table(
            "metrics",
            "Every metric, means over the seeds",
            ("target", "split", "method", "settings", "seeds", "metric", "mean", "sd"),
            (row for target in targets for row in _metrics(target)),
        ),
        *(_attention(one) for one in contents.attention),
        table(
            "needed",
            "Each source masked separately, without further training",
            ABLATION,
            (row for one in contents.inspected for row in _ablation(*one)),
        ),
        table(
            "cost",
            "Cost, means over the seeds",
            ("target", "method", "score", *_COST),
            (
                [one.label, row["method"], row["score"], *(row[key] for key in _COST.values())]
                for one in targets
                for row in costs(one)
            ),
        ),
    ]


def _chosen(targets: Sequence[Target]) -> list[str]:
    return [f"{one.label}, {line}" for one in targets for line in chosen_settings(one, every_method(targets))]


def _scores(target: Target, methods: Sequence[str], value: Any) -> list[Any]:
    groups = [target.groups.get(method) for method in methods]
    return [target.label, target.metric, target.split, *(None if one is None else value(one) for one in groups)]


def _difference(target: Target, group: Group) -> list[Any]:
    start = [target.label, group.method, group.differing, len(group.scores), group.mean, group.deviation]
    unequal, d = "; ".join(group.unequal), group.difference
    if d is None:
        return [*start, *[None] * len(_DIFFERENCE), unequal, None]
    values = vars(d) | {"adjusted": group.adjusted}
    return [*start, *(values[key] for key in _DIFFERENCE), unequal, d.pairs]


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
    entropies = [None] * len(one.mean) if one.entropy is None else map(float, one.entropy)
    rows = zip(layer_names(one.slots), one.mean, entropies, strict=True)
    values = ([layer, *map(float, weights), entropy] for layer, weights, entropy in rows)
    name = file_name("attention", one.target, one.method)
    return table(name, caption, ("layer", *one.sources, "entropy"), values)


def _ablation(target: Target, method: str, trained: Any, inspection: dict[str, Any]) -> Iterable[list[Any]]:
    metric, full = next(iter(inspection["metrics"].items()))
    changes: dict[str, Difference] = ablation(inspection, metric)
    for source, change in changes.items():
        without = inspection["masked"][source]["metrics"][metric]
        names = [target.label, method, trained.name, source, metric, full, without, without - full]
        yield [*names, change.low, change.high, chosen_setting(target.groups[method])]

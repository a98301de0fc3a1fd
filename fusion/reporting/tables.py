"""The tables of the page as data frames, written as CSV with every digit and as LaTeX with booktabs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.reporting.attention import Attention, layer_names
from fusion.reporting.contents import Contents, costs
from fusion.reporting.inspections import ablation
from fusion.reporting.scores import Trained
from fusion.reporting.targets import BASELINE, Group, Target, every_method
from fusion.reporting.wording import file_name, mean_of

if TYPE_CHECKING:
    from pandas import DataFrame

_LATEX = {"±": r"$\pm$", "−": r"$-$", "←": r"$\leftarrow$", "·": r"$\cdot$", "<": r"$<$", ">": r"$>$"}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would evaluate a text with such a prefix
# Column names of the files.
COST = ("parameters that train", "stored bytes", "seconds", "tokens per second", "peak memory bytes", "energy (J)")
DIFFERENCES = (
    *("target", "method", "settings", "seeds", "mean", "sd", "difference", "low", "high", "p", "p (Holm)"),
    *("wins", "ties", "losses", "over", "not at equal budget", "pairs"),
)
ABLATION = (
    *("target", "method", "artifact", "source", "metric", "with it", "without it", "change", "low", "high"),
    "setting",
)


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
    targets, methods = contents.everything, every_method(contents.everything)
    chosen = [f"{one.label}, {line}" for one in targets for line in one.settings(methods)]
    caption = "; ".join(["Mean and standard deviation over the seeds", *chosen])
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
            f"Differences to the {BASELINE}",
            DIFFERENCES,
            (_difference(target, group) for target in contents.targets for group in target.every_group),
        ),
        table(
            "metrics",
            "Every metric, means over the seeds",
            ("target", "split", "method", "settings", "seeds", "metric", "mean", "sd"),
            (row for target in targets for row in _metrics(target)),
        ),
        *map(_attention, contents.attention),
        table(
            "needed",
            "Each source masked separately, without further training",
            ABLATION,
            (row for one in contents.inspected for row in _ablation(*one)),
        ),
        table(
            "cost",
            "Cost, means over the seeds",
            ("target", "method", "score", *COST),
            ([one.label, *row.values()] for one in targets for row in costs(one)),
        ),
    ]


def _difference(target: Target, group: Group) -> list[Any]:
    start = [target.label, group.method, group.differing, len(group.scores), group.mean, group.deviation]
    unequal, d = "; ".join(group.unequal), group.difference
    if d is None:
        return [*start, *[None] * 9, unequal, None]
    return [*start, d.mean, d.low, d.high, d.p, group.adjusted, d.wins, d.ties, d.losses, d.unit, unequal, d.pairs]


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


def _ablation(target: Target, method: str, trained: Trained, inspection: dict[str, Any]) -> Iterable[list[Any]]:
    metric, full = next(iter(inspection["metrics"].items()))
    for source, change in ablation(inspection, metric).items():
        without = inspection["masked"][source]["metrics"][metric]
        names = [target.label, method, trained.name, source, metric, full, without, without - full]
        yield [*names, change.low, change.high, target.groups[method].setting]

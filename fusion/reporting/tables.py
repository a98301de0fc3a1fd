"""Tables for a paper: CSV with every digit, LaTeX with booktabs."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "←": r"$\leftarrow$",
    "·": r"$\cdot$",
    "<": r"$<$",
    ">": r"$>$",
}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would take for a formula


@dataclass(frozen=True)
class Table:
    """rows: cells as numbers, texts or None. shown: the same for a reader, where that differs."""

    name: str
    caption: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[Any]]
    shown: Sequence[Sequence[str]] | None = None


def save(table: Table, folder: Path) -> list[Path]:
    """NAME.csv and NAME.tex."""
    paths = [folder / f"{table.name}.csv", folder / f"{table.name}.tex"]
    with open(paths[0], "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table.header)
        writer.writerows([[_cell(cell) for cell in row] for row in table.rows])
    paths[1].write_text(latex(table), encoding="utf-8")
    return paths


def latex(table: Table) -> str:
    """The first column to the left, the others to the right; needs \\usepackage{booktabs}."""
    lines = [
        f"% {' '.join(table.caption.split())}",
        r"\begin{tabular}{l" + "r" * (len(table.header) - 1) + "}",
        r"\toprule",
        " & ".join(map(escaped, table.header)) + r" \\",
        r"\midrule",
        *(" & ".join(escaped(_text(cell)) for cell in row) + r" \\" for row in table.shown or table.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _text(cell: Any) -> str:
    if cell is None:
        return "--"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _cell(cell: Any) -> Any:
    """A text that begins like a formula gets an apostrophe before it: the file may be opened in a spreadsheet."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell

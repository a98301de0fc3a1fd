"""Local files and Hub datasets as tables of raw columns."""

from __future__ import annotations

import contextlib
import json
import logging
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.data.files import READABLE, SplitFiles, file_format, read_content
from fusion.data.formats import read_conll, read_delimited, read_json, read_jsonl
from fusion.errors import UserError, first_line
from fusion.hub.access import from_cache_or_hub, hub_is_reachable, offline
from fusion.tasks.columns import Table, counted
from fusion.tasks.task import HubConfig
from fusion.text import listed, repeated

if TYPE_CHECKING:
    import pyarrow


def arrow_table(table: pyarrow.Table, where: str) -> Table:
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

    try:  # `datasets` stores its features here; files of other programs have none
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
    )


def read_split(files: SplitFiles, quoting: str | None = None) -> Table:
    """Read all files of a split with `read_table`; shards must have the same columns."""
    tables = [read_table(path, quoting) for path in files.paths]
    return tables[0] if len(tables) == 1 else _concatenated(tables, str(files))


def read_table(path: Path, quoting: str | None = None) -> Table:
    """Read a local file or a `save_to_disk` folder. For `quoting`, see `read_delimited`.

    Raises UserError if the content does not match the extension, or the extension is unknown.
    """
    form = "save_to_disk" if path.is_dir() else file_format(path)
    if form is None:
        raise UserError(f"{path}: expected a file with one of the extensions {READABLE}")
    try:
        if form == "save_to_disk":
            data = _datasets().load_from_disk(str(path.resolve()))
            return arrow_table(data.with_format("arrow")[:], str(path))
        if form == ".parquet":
            import pyarrow.parquet

            parquet = pyarrow.parquet.read_table(path, partitioning=None, page_checksum_verification=True)
            return arrow_table(parquet, str(path))
        extension, _, compression = form[1:].partition(".")
        content = read_content(path, compression)
        if extension in ("csv", "tsv"):
            return read_delimited(path, content, extension == "tsv", quoting)
        return {"json": read_json, "jsonl": read_jsonl, "conll": read_conll}[extension](path, content)
    except UserError:
        raise
    except Exception as error:  # errors of the system, decompressors, pyarrow and datasets have no common type
        raise UserError(
            f"{path}: cannot be read as {form.removeprefix('.')}: {first_line(error)[:200]}\n"
            f"Check the file, or give it the extension of its format: {READABLE}"
        ) from error


def _concatenated(tables: list[Table], where: str) -> Table:
    first = tables[0]
    for table in tables[1:]:
        # Also compares class names, since the same ids must mean the same classes.
        if set(table.columns) != set(first.columns) or table.classes != first.classes:
            differing = sorted(set(table.columns) ^ set(first.columns)) or sorted({**first.classes, **table.classes})
            raise UserError(
                f"{table.where}: column {listed(differing)} differs from {Path(first.where).name} in its name or "
                "class names; all shards must have the same columns and features"
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
    """Load a split of a Hub dataset by its name on the Hub, from the local cache if possible.

    Raises UserError, with `hint`, if it is neither in the cache nor on the Hub.
    """
    datasets = _datasets()  # before `offline` changes settings that the Hub client reads on import
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
            except Exception as error:  # from any library: a bad file, an old script, a lost connection
                cause: BaseException = error
                while cause.__cause__ is not None and "error occurred" in str(cause):
                    cause = cause.__cause__  # `datasets` hides a file's error behind "An error occurred"
                fix = "; try hub.revision=refs/convert/parquet in the task file"
                is_script = "scripts are no longer supported" in str(cause)
                raise ValueError(first_line(cause) + (fix if is_script else "")) from error

    return from_cache_or_hub(load, where, hint)


def _datasets() -> Any:
    """Import `datasets` without progress bars and log messages; its errors are still raised."""
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)
    if datasets.is_progress_bar_enabled():
        datasets.disable_progress_bars()
    return datasets

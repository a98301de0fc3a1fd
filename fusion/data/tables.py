"""Files and hub data sets as tables of raw columns; what cannot be read says which file and line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.config import HubConfig
from fusion.errors import UserError, first_line
from fusion.hub import from_cache_or_hub, hub_is_reachable

if TYPE_CHECKING:
    import pyarrow

ENDINGS = (".parquet", ".jsonl", ".csv", ".tsv")


class _Absent:
    """A value that a row does not have, to tell it from null."""


_ABSENT = _Absent()


@dataclass(frozen=True)
class Table:
    """Raw columns by name, and how to name a row of them to the user."""

    where: str
    columns: tuple[str, ...]
    rows: int
    read: Callable[[str], list[Any]]  # a column's values
    row_name: Callable[[int], str]

    def column(self, path: str) -> list[Any] | None:
        """The values at `path`, None where the table has no such column.

        `path` is a column, or goes on into nested values: `choices.text` is the field `text` of the struct
        (or of each struct of the list) in `choices`, `choices.0` its first element.
        """
        if path in self.columns:
            return self.read(path)
        head, _, rest = path.partition(".")
        if not rest or head not in self.columns:
            return None
        values = self.read(head)
        for key in rest.split("."):
            values = [_step(value, key) for value in values]
        if values and all(value is _ABSENT for value in values):
            return None
        return [None if value is _ABSENT else value for value in values]

    def at(self, row: int) -> str:
        return f"{self.where}, {self.row_name(row)}"


def shown(value: Any) -> str:
    """A raw value for a message, with its type."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _step(value: Any, key: str) -> Any:
    """One step into a nested value."""
    if isinstance(value, dict):
        return value.get(key, _ABSENT)
    if isinstance(value, (list, tuple)):
        if key.isdigit():
            return value[int(key)] if int(key) < len(value) else _ABSENT
        if value and all(isinstance(element, dict) and key in element for element in value):
            return [element[key] for element in value]
    return _ABSENT


def _counted(row: int) -> str:
    return f"row {row + 1}"


def arrow_table(table: pyarrow.Table, where: str) -> Table:
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise UserError(f"{where}: column {', '.join(twice)} stands twice; expected each name once")
    return Table(
        where=where,
        columns=tuple(table.column_names),
        rows=table.num_rows,
        read=lambda name: table.column(name).to_pylist(),
        row_name=_counted,
    )


def record_table(records: Iterable[dict[str, Any]], where: str, lines: list[int] | None = None) -> Table:
    """A table of dicts; `lines` are the numbers of the lines they came from, if any."""
    rows = list(records)
    return Table(
        where=where,
        columns=tuple(dict.fromkeys(key for row in rows for key in row)),
        rows=len(rows),
        read=lambda name: [row.get(name) for row in rows],
        row_name=_counted if lines is None else lambda row: f"line {lines[row]}",
    )


def read_table(path: Path, text_columns: Iterable[str] = ()) -> Table:
    """The table in a local file.

    Args:
        path: a file with one of `ENDINGS`.
        text_columns: columns of a CSV or TSV file that hold text even where all of it looks like numbers.

    Raises:
        UserError: the file is not what its ending says, or has another.
    """
    import pyarrow

    if path.suffix not in ENDINGS:
        raise UserError(f"{path}: expected a file with one of the endings {', '.join(ENDINGS)}")
    try:
        if path.suffix == ".jsonl":
            return _read_jsonl(path)
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return arrow_table(pyarrow.parquet.read_table(path, partitioning=None), str(path))
        return _read_delimited(path, text_columns)
    except (pyarrow.ArrowException, OSError) as error:
        reason = first_line(error)
        raise UserError(
            f"{path}: cannot be read as {path.suffix[1:]}: {reason}\n"
            f"Write it anew, or give it the ending of what it holds ({', '.join(ENDINGS)})"
        ) from error


def _read_jsonl(path: Path) -> Table:
    records, lines = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not UTF-8 text ({error.reason}); expected one JSON object"
            ) from error
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error.msg}, column {error.colno}); expected one object a line"
            ) from error
        if not isinstance(record, dict):
            raise UserError(
                f'{path}, line {number}: expected a JSON object such as {{"text": ...}}, got {type(record).__name__}'
            )
        records.append(record)
        lines.append(number)
    return record_table(records, str(path), lines)


def _read_delimited(path: Path, text_columns: Iterable[str]) -> Table:
    """CSV with RFC 4180 quotes; TSV without any, as GLUE's files are (their quotes do not close)."""
    import pyarrow
    import pyarrow.csv

    tabs = path.suffix == ".tsv"
    table = pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(
            delimiter="\t" if tabs else ",",
            quote_char=False if tabs else '"',
            newlines_in_values=not tabs,
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pyarrow.string() for name in text_columns},
            null_values=[""],
            strings_can_be_null=False,
        ),
    )
    return arrow_table(table, str(path))


def hub_table(hub: HubConfig, split: str, cure: str) -> Table:
    """A split of a data set, from the local cache first.

    Args:
        split: as the hub names it.
        cure: what does without the hub, for the message.

    Raises:
        UserError: neither the cache nor the hub has it, or it has no such configuration or split.
    """
    where = hub.path + (f" ({hub.name})" if hub.name else "") + f", {split}"

    def load(cached_only: bool) -> Table:
        import datasets

        if cached_only and hub.revision is not None and hub_is_reachable():
            raise FileNotFoundError("the cache does not tell revisions apart")
        with _quiet(), _offline() if cached_only else contextlib.nullcontext():
            try:
                data = datasets.load_dataset(hub.path, hub.name, split=split, revision=hub.revision)
            except (OSError, ValueError):
                raise
            # Whatever the libraries below raise: a bad file, an old script, a lost connection.
            except Exception as error:
                raise ValueError(_reason(error)) from error
        return arrow_table(data.with_format("arrow")[:], where)

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
def _offline() -> Iterator[None]:
    """Keep `datasets` and the hub's client to what is in their caches."""
    import datasets.config
    import huggingface_hub.constants

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


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

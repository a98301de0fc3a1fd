"""Files of a split, and local files and Hub datasets as tables of raw columns.

A split in a task's folder is one file, shards named as on the Hub, or a `save_to_disk` folder.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import logging
import lzma
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.data.formats import read_conll, read_delimited, read_json, read_jsonl
from fusion.errors import UserError, first_line
from fusion.hub.access import from_cache_or_hub, hub_is_reachable, offline
from fusion.tasks.columns import Table, counted
from fusion.tasks.task import HubConfig
from fusion.text import listed, repeated

if TYPE_CHECKING:
    import pyarrow

READABLE = ".parquet, .jsonl, .json, .csv, .tsv or .conll (all but .parquet also with .gz, .bz2, .xz or .zst)"

_NAME = re.compile(
    r"(?P<split>.+?)(-(?P<shard>\d{5,9})-of-(?P<shards>\d{5,9})(-[0-9a-f]{8,64})?)?"
    r"(?P<format>\.parquet|\.(jsonl|json|csv|tsv|conll)(\.(gz|bz2|xz|zst))?)",
    re.IGNORECASE,
)
_STATE = "state.json"  # marks a folder of `Dataset.save_to_disk`
_METADATA = (_STATE, "dataset_dict.json", "dataset_info.json")


def _open_zstd(path: Path) -> Any:
    import pyarrow  # the standard library has no Zstandard before Python 3.14

    return pyarrow.input_stream(str(path), compression="zstd")


_OPEN: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("rb"),
    "gz": gzip.open,
    "bz2": bz2.open,
    "xz": lzma.open,
    "zst": _open_zstd,
}


@dataclass(frozen=True)
class SplitFiles:
    """The files of a split."""

    split: str
    paths: tuple[Path, ...]  # one file, one `save_to_disk` folder, or the shards in order
    shards: int | None = None  # expected number of shards according to their names; `None` for a file or folder

    def __str__(self) -> str:
        """Return the path, or the pattern of the shards."""
        path = self.paths[0]
        return str(path if self.shards is None else path.with_name(re.sub(r"-\d+-of-", "-*-of-", path.name)))

    def check_complete(self) -> None:
        """Raise UserError if a shard is missing or duplicated."""
        numbers = [_shard_number(path) for path in self.paths]
        if self.shards is not None and (len(numbers) != self.shards or numbers != [*range(self.shards)]):
            raise UserError(
                f"{self}: expected the shards 0 to {self.shards - 1} once each, got {listed(map(str, numbers))}\n"
                "Copy all shards of the split, or write it as one file"
            )


def file_format(path: Path) -> str | None:
    """Return the lower-case extension for format and compression, such as ".csv.gz", or `None` if not supported."""
    found = _NAME.fullmatch(path.name)
    return found["format"].lower() if found else None


def contents(folder: Path) -> list[str]:
    """Return the names of non-hidden files in a folder and its subfolder `data`, for messages."""
    paths = [path for path in [*folder.iterdir(), *(folder / "data").glob("*")] if path.name[0] != "."]
    return sorted(f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}" for path in paths)


def split_files(folder: Path) -> dict[str, SplitFiles]:
    """Return the files of a folder and of its subfolder `data`, by split.

    Raises UserError if a split has multiple files that are not its shards.
    """
    inner = folder / "data"
    saved = [path for path in sorted(folder.iterdir()) if (path / _STATE).is_file()]
    groups: dict[tuple[str, object, int | None], list[Path]] = {(path.name, path, None): [path] for path in saved}
    for place in [folder, inner] if inner.is_dir() and not (inner / _STATE).is_file() else [folder]:
        for path in sorted(place.iterdir()):
            name = _NAME.fullmatch(path.name)
            if name is None or path.name in _METADATA or path.name.startswith(".") or not path.is_file():
                continue
            shards = None if name["shards"] is None else int(name["shards"])
            key = name["split"], path if shards is None else (place, name["format"].lower()), shards
            groups.setdefault(key, []).append(path)
    found: dict[str, SplitFiles] = {}
    for (split, _, shards), paths in groups.items():
        files = SplitFiles(split, tuple(sorted(paths, key=_shard_number)), shards)
        if split in found:
            raise UserError(f"both {found[split]} and {files} exist: keep one of them")
        found[split] = files
    return dict(sorted(found.items()))


def _shard_number(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found["shard"] or 0) if found else 0


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

            # `read_table` would import pyarrow.dataset, and with it pandas.
            with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as parquet:
                return arrow_table(parquet.read(), str(path))
        extension, _, compression = form[1:].partition(".")
        with _OPEN[compression](path) as file:
            content = file.read()
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

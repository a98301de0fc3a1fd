"""Files of a split in a task's folder: one file, shards named as on the hub, or a `save_to_disk` folder."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fusion.errors import UserError, first_line

FORMATS = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".conll")
READABLE = ".parquet, .jsonl, .json, .csv, .tsv or .conll (all but .parquet also with .gz, .bz2, .xz or .zst)"

_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5,9})-of-(?P<total>\d{5,9})(?:-[0-9a-f]{8,64})?")
_STATE = "state.json"  # marks a folder of `Dataset.save_to_disk`
_METADATA = (_STATE, "dataset_dict.json", "dataset_info.json")


def _open_zstd(path: Path) -> Any:
    import pyarrow  # the standard library has no Zstandard before Python 3.14

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


_OPEN: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


@dataclass(frozen=True)
class FileFormat:
    """Format and compression (or "") of a file, from its extension."""

    format: str
    compression: str = ""

    def __str__(self) -> str:
        return self.format + self.compression


@dataclass(frozen=True)
class SplitFiles:
    """The files of a split.

    Attributes:
        paths: one file, the shards in order, or a `save_to_disk` folder.
        format: None for a folder.
        total: the number of shards according to their names; None for a single file or a folder.
    """

    split: str
    paths: tuple[Path, ...]
    format: FileFormat | None = None
    total: int | None = None

    def __str__(self) -> str:
        """The path of the file or folder, or the pattern of the shards."""
        path = self.paths[0]
        if self.total is not None:
            path = path.with_name(f"{self.split}-*-of-{self.total:05d}{self.format}")
        return str(path)

    def check_complete(self) -> None:
        """Raises UserError if a shard is missing or duplicated."""
        if self.total is None:
            return
        times = Counter(_shard_number(path) for path in self.paths)
        missing = list(islice((n for n in range(self.total) if n not in times), 5))
        wrong = sorted(n for n in times if times[n] > 1 or n >= self.total)[:5]
        if missing or wrong:
            raise UserError(
                f"{self}: expected the shards 0 to {self.total - 1} once each; missing: {missing}, duplicate or out "
                f"of range: {wrong}\nCopy all shards of the split, or write it as one file"
            )


def file_format(path: Path) -> FileFormat | None:
    """The format by the extension, in upper or lower case; None: not a readable one."""
    last, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    if last in FORMATS:
        return FileFormat(last)
    # Parquet compresses its pages itself.
    is_compressed_text = last in _OPEN and inner in FORMATS and inner != ".parquet"
    return FileFormat(inner, last) if is_compressed_text else None


def contents(folder: Path) -> list[str]:
    """The names in a folder and in its `data` folder, without hidden ones, for messages."""
    paths = [path for path in [*folder.iterdir(), *(folder / "data").glob("*")] if path.name[0] != "."]
    return sorted(f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}" for path in paths)


def split_files(folder: Path) -> dict[str, SplitFiles]:
    """The files of a folder and of its subfolder `data`, by split.

    Raises:
        UserError: a split is there in two forms.
    """
    found: dict[str, SplitFiles] = {}
    for files in [*_saved_data_sets(folder), *_single_files_and_shards(folder)]:
        if files.split in found:
            raise UserError(f"both {found[files.split]} and {files} exist: keep one of them")
        found[files.split] = files
    return dict(sorted(found.items()))


def _single_files_and_shards(folder: Path) -> Iterator[SplitFiles]:
    shards: dict[tuple[str, Path, FileFormat, int], list[Path]] = {}
    inner = folder / "data"
    for place in [folder, inner] if inner.is_dir() and not (inner / _STATE).is_file() else [folder]:
        for path in sorted(place.iterdir()):
            form = file_format(path)
            if form is None or path.name in _METADATA or path.name.startswith(".") or not path.is_file():
                continue
            shard = _SHARD.fullmatch(_stem(path))
            if shard is None:
                yield SplitFiles(_stem(path), (path,), form)
            else:
                shards.setdefault((shard["split"], place, form, int(shard["total"])), []).append(path)
    for (split, _, form, total), paths in shards.items():
        yield SplitFiles(split, tuple(sorted(paths, key=_shard_number)), form, total)


def _saved_data_sets(folder: Path) -> Iterator[SplitFiles]:
    """Folders of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`."""
    state = folder / _STATE
    if not state.is_file():
        yield from (
            SplitFiles(path.name, (path,)) for path in sorted(folder.iterdir()) if (path / _STATE).is_file()
        )
        return
    try:
        split = json.loads(state.read_bytes())["_split"]
    except (ValueError, RecursionError, OSError, KeyError, TypeError):
        split = None
    if not isinstance(split, str) or not re.fullmatch(r"\w+", split):
        raise UserError(f"{state} names no split; move the data set to {folder}/train, or save it again")
    yield SplitFiles(split, (folder,))


def _stem(path: Path) -> str:
    return path.name[: len(path.name) - len(str(file_format(path) or ""))]


def _shard_number(path: Path) -> int:
    found = _SHARD.fullmatch(_stem(path))
    assert found is not None
    return int(found["number"])


def read_content(path: Path, form: FileFormat) -> bytes:
    """The bytes of a file, decompressed.

    Raises:
        UserError: the file is truncated, or is not what its extension says.
        OSError: it cannot be read.
    """
    if not form.compression:
        return path.read_bytes()
    try:
        with _OPEN[form.compression](path) as file:
            content: bytes = file.read()
            return content
    except (EOFError, OSError, lzma.LZMAError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be decompressed ({first_line(error)[:120]}); copy it again, or rename it to the "
            "extension of its content"
        ) from error


def read_text(path: object, content: bytes) -> str:
    """UTF-8 text without its byte order mark; raises UserError with the line if it is not UTF-8."""
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from error

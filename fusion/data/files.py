"""Files of a split in a task's folder: one file, shards named as on the hub, or a `save_to_disk` folder."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.text import listed

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

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


_OPEN: dict[str, Callable[[Path], Any]] = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open, "zst": _open_zstd}


@dataclass(frozen=True)
class SplitFiles:
    """The files of a split.

    Attributes:
        paths: one file, one `save_to_disk` folder, or the shards in order.
        shards: how many shards there should be according to their names; None for a single file or a folder.
    """

    split: str
    paths: tuple[Path, ...]
    shards: int | None = None

    def __str__(self) -> str:
        """The path, or the pattern of the shards."""
        path = self.paths[0]
        return str(path if self.shards is None else path.with_name(re.sub(r"-\d+-of-", "-*-of-", path.name)))

    def check_complete(self) -> None:
        """Raises UserError if a shard is missing or duplicated."""
        numbers = [_shard_number(path) for path in self.paths]
        if self.shards is not None and (len(numbers) != self.shards or numbers != [*range(self.shards)]):
            raise UserError(
                f"{self}: expected the shards 0 to {self.shards - 1} once each, got {listed(map(str, numbers))}\n"
                "Copy all shards of the split, or write it as one file"
            )


def file_format(path: Path) -> str | None:
    """The extension that names a format and a compression, such as ".csv.gz", in lower case; None if unreadable."""
    found = _NAME.fullmatch(path.name)
    return found["format"].lower() if found else None


def contents(folder: Path) -> list[str]:
    """The names in a folder and in its `data` folder, without hidden ones, for messages."""
    paths = [path for path in [*folder.iterdir(), *(folder / "data").glob("*")] if path.name[0] != "."]
    return sorted(f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}" for path in paths)


def split_files(folder: Path) -> dict[str, SplitFiles]:
    """The files of a folder and of its subfolder `data`, by split.

    Raises:
        UserError: there are two files of a split that are not its shards.
    """
    found: dict[str, SplitFiles] = {}
    for files in [*_saved_data_sets(folder), *_single_files_and_shards(folder)]:
        if files.split in found:
            raise UserError(f"both {found[files.split]} and {files} exist: keep one of them")
        found[files.split] = files
    return dict(sorted(found.items()))


def _single_files_and_shards(folder: Path) -> Iterator[SplitFiles]:
    shards: dict[tuple[str, Path, str, int], list[Path]] = {}
    inner = folder / "data"
    for place in [folder, inner] if inner.is_dir() and not (inner / _STATE).is_file() else [folder]:
        for path in sorted(place.iterdir()):
            name = _NAME.fullmatch(path.name)
            if name is None or path.name in _METADATA or path.name.startswith(".") or not path.is_file():
                continue
            if name["shard"] is None:
                yield SplitFiles(name["split"], (path,))
            else:
                key = name["split"], place, name["format"].lower(), int(name["shards"])
                shards.setdefault(key, []).append(path)
    for (split, _, _, total), paths in shards.items():
        yield SplitFiles(split, tuple(sorted(paths, key=_shard_number)), total)


def _shard_number(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found["shard"] or 0) if found else 0


def _saved_data_sets(folder: Path) -> Iterator[SplitFiles]:
    """Folders of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`."""
    state = folder / _STATE
    if not state.is_file():
        yield from (SplitFiles(path.name, (path,)) for path in sorted(folder.iterdir()) if (path / _STATE).is_file())
        return
    try:
        split = json.loads(state.read_bytes())["_split"]
    except (ValueError, RecursionError, OSError, KeyError, TypeError):
        split = None
    if not isinstance(split, str) or not re.fullmatch(r"\w+", split):
        raise UserError(f"{state} names no split; move the data set to {folder}/train, or save it again")
    yield SplitFiles(split, (folder,))


def read_content(path: Path, compression: str) -> bytes:
    """The bytes of a file, decompressed; raises the errors of the system and of the decompressors."""
    with _OPEN[compression](path) if compression else path.open("rb") as file:
        content: bytes = file.read()
        return content


def read_text(path: object, content: bytes) -> str:
    """UTF-8 text without its byte order mark; raises UserError with the line if it is not UTF-8."""
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error

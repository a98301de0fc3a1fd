"""Files of a split in a task's folder: one file, shards named as on the Hub, or a `save_to_disk` folder."""

from __future__ import annotations

import bz2
import gzip
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
        shards: expected number of shards according to their names; `None` for a single file or a folder.
    """

    split: str
    paths: tuple[Path, ...]
    shards: int | None = None

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
    saved = [SplitFiles(path.name, (path,)) for path in sorted(folder.iterdir()) if (path / _STATE).is_file()]
    found: dict[str, SplitFiles] = {}
    for files in [*saved, *_single_files_and_shards(folder)]:
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


def read_content(path: Path, compression: str) -> bytes:
    """Read and decompress a file; raises the errors of the system and of the decompressors."""
    with _OPEN[compression](path) if compression else path.open("rb") as file:
        content: bytes = file.read()
        return content

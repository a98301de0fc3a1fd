"""Which files of a folder hold a split: one file, shards as the hub names them, or a folder of `save_to_disk`."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from fusion.errors import UserError

FORMATS = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".conll")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")  # of any format but Parquet, which compresses its pages itself
READABLE = ".parquet, .jsonl, .json, .csv, .tsv or .conll (all but .parquet also with .gz, .bz2, .xz or .zst)"

_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5,9})-of-(?P<total>\d{5,9})(?:-[0-9a-f]{8,64})?")
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # what `save_to_disk` of `datasets` writes
_CHUNK = 2**20


@dataclass(frozen=True)
class Form:
    """What an ending says of a file: one of `FORMATS`, and one of `COMPRESSIONS` or nothing."""

    format: str
    compression: str = ""

    def __str__(self) -> str:
        return self.format + self.compression


@dataclass(frozen=True)
class SplitFiles:
    """What holds a split.

    Attributes:
        paths: one file, the shards in order, or a folder of `save_to_disk`.
        form: of the files; None for a folder.
        total: how many shards there should be.
    """

    split: str
    paths: tuple[Path, ...]
    form: Form | None
    total: int = 1

    @property
    def is_sharded(self) -> bool:
        return self.form is not None and _SHARD.fullmatch(_stem(self.paths[0], self.form)) is not None

    def __str__(self) -> str:
        """For messages: the name of the file or folder, of shards their common part."""
        first = self.paths[0]
        place = "data/" if first.parent.name == "data" and self.form is not None else ""
        if self.form is None:
            return f"{first.name}/"
        return (
            f"{place}{self.split}-*-of-{self.total:05d}{self.form}" if self.is_sharded else place + first.name
        )

    def check_complete(self) -> None:
        """
        Raises:
            UserError: shards are missing, or two files are the same shard.
        """
        if not self.is_sharded:
            return
        seen: dict[int, Path] = {}
        for path in self.paths:
            number = shard_number(path)
            if number in seen:
                raise UserError(
                    f"{path.parent} has both {seen[number].name} and {path.name}: keep one of them"
                )
            seen[number] = path
        missing = [number for number in range(min(self.total, 10**6)) if number not in seen]
        if len(seen) != self.total or missing:
            names = [f"{self.split}-{number:05d}-of-{self.total:05d}{self.form}" for number in missing[:5]]
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            wrong = f"no {', '.join(names)}{more}" if missing else f"shards beyond {self.total:05d}"
            raise UserError(
                f"{self.paths[0].parent}: {len(seen)} of {self.total} shards of {self.split} are there: {wrong}\n"
                "Copy all shards of the split, or write it as one file"
            )


def form_of(path: Path) -> Form | None:
    """What the ending of a file says, in either case; None: it is read by nobody here."""
    endings = [suffix.lower() for suffix in path.suffixes[-2:]]
    if not endings:
        return None
    if endings[-1] in FORMATS:
        return Form(endings[-1])
    text = len(endings) == 2 and endings[0] in FORMATS and endings[0] != ".parquet"
    return Form(endings[0], endings[1]) if text and endings[1] in COMPRESSIONS else None


def shard_number(path: Path) -> int:
    """The number in the name of a shard, from 0."""
    found = _SHARD.fullmatch(_stem(path, form_of(path)))
    assert found is not None
    return int(found["number"])


def contents(folder: Path) -> list[str]:
    """The names in a folder and in its `data` folder, hidden ones left out, for messages."""
    names = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and path.name == "data" and not (path / _STATE).is_file():
            names += [f"data/{name}" for name in contents(path)] or ["data/"]
        else:
            names.append(f"{path.name}/" if path.is_dir() else path.name)
    return names


def split_files(folder: Path) -> dict[str, SplitFiles]:
    """What a folder holds, by split. Its subfolder `data` is looked into as well.

    Raises:
        UserError: a split is there in two forms, or what `save_to_disk` has written is not complete.
    """
    found: dict[str, list[SplitFiles]] = {}
    for split in [*_saved(folder), *_in_files(folder)]:
        found.setdefault(split.split, []).append(split)
    for forms in found.values():
        if len(forms) > 1:
            raise UserError(f"{folder} has both {forms[0]} and {forms[1]}: keep one of them")
    return {split: forms[0] for split, forms in sorted(found.items())}


def _in_files(folder: Path) -> Iterator[SplitFiles]:
    shards: dict[tuple[str, Path, Form, int], list[Path]] = {}
    inner = folder / "data"
    places = [folder, inner] if inner.is_dir() and not (inner / _STATE).is_file() else [folder]
    for place in places:
        for path in sorted(place.iterdir()):
            form = form_of(path)
            own = path.name in (_STATE, _SPLITS, "dataset_info.json")
            if form is None or own or path.name.startswith(".") or not path.is_file():
                continue
            stem = _stem(path, form)
            shard = _SHARD.fullmatch(stem)
            if shard is None:
                yield SplitFiles(stem, (path,), form)
            else:
                key = (shard["split"], place, form, int(shard["total"]))
                shards.setdefault(key, []).append(path)
    for (split, _, form, total), paths in shards.items():
        yield SplitFiles(split, tuple(sorted(paths, key=shard_number)), form, total)


def _saved(folder: Path) -> Iterator[SplitFiles]:
    """What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` have written."""
    if (folder / _STATE).is_file():
        split = _json(folder / _STATE).get("_split")
        if not isinstance(split, str) or not re.fullmatch(r"\w+", split):
            raise UserError(
                f"{folder} is a data set of save_to_disk that names no split\n"
                f"Move it to {folder}/train (or validation, test)"
            )
        yield SplitFiles(split, (folder,), None)
        return
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and (path / _STATE).is_file()]
    if (folder / _SPLITS).is_file():
        named = _json(folder / _SPLITS).get("splits")
        missing = [name for name in named or [] if str(name) not in {path.name for path in inner}]
        if not isinstance(named, list) or missing:
            raise UserError(
                f"{folder / _SPLITS}: names the splits {named}, and {', '.join(map(str, missing)) or 'that is no list'} "
                "is missing; save the data set again with save_to_disk"
            )
    for path in inner:
        yield SplitFiles(path.name, (path,), None)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); save the data set again with save_to_disk"
        ) from error
    return content if isinstance(content, dict) else {}


def _stem(path: Path, form: Form | None) -> str:
    return path.name[: -len(str(form))] if form is not None else path.name


# --- content ----------------------------------------------------------------------------------------


def read_content(path: Path, form: Form, most: int) -> bytes:
    """The bytes of a file, decompressed.

    Args:
        most: bytes that a compressed file may become.

    Raises:
        UserError: it becomes more, or ends too early, or is not what its ending says.
        OSError: it cannot be read.
    """
    if not form.compression:
        return path.read_bytes()
    parts: list[bytes] = []
    size = 0
    try:
        with _decompressed(path, form.compression) as file:
            while part := file.read(_CHUNK):
                size += len(part)
                if size > most:
                    raise UserError(
                        f"{path}: takes more than {most / 1e9:.1f} GB once decompressed, too much for this machine's "
                        "memory\nKeep fewer rows, or only the columns of the task"
                    )
                parts.append(part)
    except (EOFError, OSError, lzma.LZMAError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system
            raise
        raise UserError(
            f"{path}: cannot be decompressed ({str(error)[:120] or type(error).__name__}); "
            "copy it again, or give it the ending of what it holds"
        ) from error
    return b"".join(parts)


def _decompressed(path: Path, compression: str) -> IO[bytes]:
    if compression == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if compression == ".bz2":
        return cast(IO[bytes], bz2.open(path))
    if compression == ".xz":
        return cast(IO[bytes], lzma.open(path))
    import pyarrow  # the standard library has no Zstandard before Python 3.14

    return cast(IO[bytes], pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))

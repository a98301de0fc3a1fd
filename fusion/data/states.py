"""Cached frozen features: a memory-mapped array of the hidden states of all tokens of a split.

A file contains the array's bytes, followed by a checksum of the bytes, their shape and dtype, and the file's name.
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion.data.cache import discard, read_or_build
from fusion.files import PARTIAL, atomic_path

_SUFFIX = ".states"
_DAY = 86_400.0  # seconds after which the temporary file of a killed process may be removed


def cached_states(
    path: Path, shape: tuple[int, int], dtype: str, limit: int, build: Callable[[NDArray[Any]], None]
) -> NDArray[Any]:
    """Memory-map the states in a file, which is built first if it is missing or damaged.

    Args:
        path: the file without its suffix.
        shape: (tokens, width), the shape of the result.
        limit: maximum total size in bytes of these files in the folder; the least recently used ones are removed.
        build: callable that fills an array of this shape.

    Raises:
        OSError: if the folder is not writable, or the disk is full.
    """
    path = path.with_name(path.name + _SUFFIX)
    path.parent.mkdir(parents=True, exist_ok=True)

    def write() -> NDArray[Any]:
        _make_room(path.parent, _size(shape, dtype), limit)
        _write(path, shape, dtype, build)
        return np.memmap(path, dtype, mode="r", shape=shape)

    states = read_or_build(path, lambda: _read(path, shape, dtype), write)
    with contextlib.suppress(OSError):  # files of other users can be read but not touched
        os.utime(path)
    return states


def _size(shape: tuple[int, int], dtype: str) -> int:
    return shape[0] * shape[1] * np.dtype(dtype).itemsize


def _read(path: Path, shape: tuple[int, int], dtype: str) -> NDArray[Any] | None:
    if not path.is_file():
        return None
    reason = "size or checksum mismatch"
    try:
        if path.stat().st_size == _size(shape, dtype) + 4:
            states = np.memmap(path, dtype, mode="r", shape=shape)
            with path.open("rb") as file:
                file.seek(-4, os.SEEK_END)
                if int.from_bytes(file.read(4), "little") == _checksum(states, path.name):
                    return states
    except OSError as error:
        reason = str(error)
    discard(path, reason)
    return None


def _write(path: Path, shape: tuple[int, int], dtype: str, build: Callable[[NDArray[Any]], None]) -> None:
    with atomic_path(path) as partial:
        with partial.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # raises now if the disk is full, instead of crashing while writing
                os.posix_fallocate(file.fileno(), 0, _size(shape, dtype))
            file.truncate(_size(shape, dtype))
        states = np.memmap(partial, dtype, mode="r+", shape=shape)
        build(states)
        states.flush()
        with partial.open("ab") as file:
            file.write(_checksum(states, path.name).to_bytes(4, "little"))
            file.flush()
            os.fsync(file.fileno())


def _checksum(states: NDArray[Any], name: str) -> int:
    described = zlib.crc32(f"{name} {states.shape} {states.dtype}".encode())
    return zlib.crc32(states.reshape(-1).view(np.uint8).data, described)


def _make_room(folder: Path, needed: int, limit: int) -> None:
    """Remove the least recently used files until the new one fits. Processes that mapped a file can still read it."""
    total, removable = needed, []
    for file in folder.glob(f"*{_SUFFIX}*"):  # including hidden files
        with contextlib.suppress(OSError):  # removed by another process
            status = file.stat()
            total += status.st_size if file.suffix in (_SUFFIX, PARTIAL) else 0
            if file.suffix == _SUFFIX or (file.suffix == PARTIAL and time.time() - status.st_mtime > _DAY):
                removable.append((status.st_mtime, status.st_size, file))
    for _, size, file in sorted(removable):
        if total <= limit:
            break
        with contextlib.suppress(OSError):
            file.unlink()
            total -= size

"""States of all tokens of a split as one array on disk: written whole or not at all, read through a memory map.

A file is the array's bytes and then a checksum, of them and of the file's name; the name says what is in it, so that a
reader knows its shape, and another file under this name is seen.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion.data.cache import cache_lock
from fusion.files import PARTIAL, atomic_path, remove_partial

_ENDING = ".states"
_DAY = 86_400.0  # seconds without a written page: whoever made it is gone
_STUCK = 1800.0  # seconds without a written page, after which nobody waits for it any longer
_SLICE = 1 << 24  # bytes that the checksum takes at a time

log = logging.getLogger(__name__)


def kept_states(
    path: Path, shape: tuple[int, int], dtype: str, limit: int, build: Callable[[NDArray[Any]], None]
) -> NDArray[Any]:
    """The states in a file, which is built first where it is missing or damaged.

    Of several processes that want the same file, one builds it and the others wait for it.

    Args:
        path: without its ending.
        shape: (tokens, width).
        limit: bytes that all such files in the folder may take; the longest unused make room.
        build: fills an array of this shape.

    Returns:
        (tokens, width), read-only.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    path = path.with_name(path.name + _ENDING)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():  # said before anything is computed
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    states = _read(path, shape, dtype)
    if states is None:
        # For as long as it grows: a build may take long.
        with cache_lock(path, wait=_STUCK, progress=lambda: _written(path)) as alone:
            states = _read(path, shape, dtype, quiet=True)
            if states is None:
                if alone:
                    remove_partial(path)
                _make_room(path.parent, _bytes(shape, dtype), limit)
                _write(path, shape, dtype, build)
                states = np.memmap(path, dtype, mode="r", shape=shape)
    with contextlib.suppress(OSError):  # somebody else's file may be read all the same
        os.utime(path)  # used now: the last to make room
    return states


def _bytes(shape: tuple[int, int], dtype: str) -> int:
    return shape[0] * shape[1] * np.dtype(dtype).itemsize


def _read(path: Path, shape: tuple[int, int], dtype: str, quiet: bool = False) -> NDArray[Any] | None:
    if not path.is_file():
        return None
    with contextlib.suppress(OSError):  # it may not be read, or make room for another just now
        if path.stat().st_size == _bytes(shape, dtype) + 4:
            states = np.memmap(path, dtype, mode="r", shape=shape)
            with path.open("rb") as file:
                file.seek(-4, os.SEEK_END)
                if int.from_bytes(file.read(4), "little") == _checksum(states, path.name):
                    return states
    if not quiet:
        log.warning("%s is damaged: made anew", path)
    return None


def _written(path: Path) -> set[tuple[str, float]]:
    """What others are making of this file, and when they last wrote to it."""
    found = set()
    for partial in path.parent.glob(f".{path.name}.*{PARTIAL}"):
        with contextlib.suppress(OSError):
            found.add((partial.name, partial.stat().st_mtime))
    return found


def _write(path: Path, shape: tuple[int, int], dtype: str, build: Callable[[NDArray[Any]], None]) -> None:
    with atomic_path(path) as partial:
        with partial.open("wb") as file:
            if hasattr(
                os, "posix_fallocate"
            ):  # at once, so that a full disk is an error here, not a crash later
                os.posix_fallocate(file.fileno(), 0, _bytes(shape, dtype))
            file.truncate(_bytes(shape, dtype))
        states = np.memmap(partial, dtype, mode="r+", shape=shape)
        build(states)
        states.flush()
        with partial.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(_checksum(states, path.name).to_bytes(4, "little"))
            os.fsync(file.fileno())
        del states


def _checksum(states: NDArray[Any], name: str) -> int:
    described = f"{name} {states.shape} {states.dtype}"
    flat, value = states.reshape(-1).view(np.uint8), zlib.crc32(described.encode())
    for start in range(0, len(flat), _SLICE):
        value = zlib.crc32(flat[start : start + _SLICE].data, value)
    return value


def _make_room(folder: Path, needed: int, limit: int) -> None:
    """Remove the longest unused files until the new one fits. Who has one open keeps what it maps."""
    there, files = 0, []
    for file in [*folder.glob(f"*{_ENDING}"), *folder.glob(f".*{_ENDING}.*{PARTIAL}")]:
        with contextlib.suppress(OSError):  # another process removed it just now
            status = file.stat()
            left_over = file.suffix == PARTIAL
            if left_over and time.time() - status.st_mtime > _DAY:
                file.unlink()
                continue
            there += status.st_size
            if not left_over:  # else another process is making it
                files.append((status.st_mtime, status.st_size, file))
    for _, size, file in sorted(files):
        if there + needed <= limit:
            break
        with contextlib.suppress(OSError):
            file.unlink()
            there -= size

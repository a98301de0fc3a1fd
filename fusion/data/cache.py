"""The user's cache: files that can be rebuilt and are written atomically, among them token ids and frozen features."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fusion.errors import first_line
from fusion.files import PARTIAL, atomic_path, remove_partial, write_atomic
from fusion.locks import lock

Arrays = dict[str, NDArray[Any]]

_WAIT = 3600.0  # seconds for another process to build a file
_SUFFIX = ".states"
_DAY = 86_400.0  # seconds after which the temporary file of a killed process may be removed

log = logging.getLogger(__name__)
Content = TypeVar("Content")

_METADATA = "key and crc32"  # a single entry: with more, their order and therefore the bytes of the file would vary


def read_or_build(path: Path, read: Callable[[], Content | None], build: Callable[[], Content]) -> Content:
    """Read a cache file, which is built first if it is missing or damaged.

    If multiple processes need the same file, one builds it and the others wait. The lock only saves work: if the file
    system does not support locks, or building takes longer than an hour, each process builds the file itself.

    `read` returns `None` if the file is missing, and calls `discard` if it is damaged.
    """
    content = read()
    if content is not None:
        return content
    lock_file = path.with_name(f"{path.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(lock_file, f"{path} is being written", _WAIT))
            # Removed before the lock is released; a waiting process then acquires it and finds the built file.
            stack.callback(lock_file.unlink, missing_ok=True)
            remove_partial(path)
        except OSError as error:  # a timeout as well
            log.info("%s: no lock (%s)", path, error)
        content = read()  # another process may have built it
        return build() if content is None else content


def discard(path: Path, reason: str) -> None:
    log.warning("%s is damaged (%s) and is rebuilt", path, reason)
    with contextlib.suppress(OSError):
        path.unlink()


def write_cache_file(path: Path, content: bytes) -> None:
    """Write a file atomically, or log a warning if its folder is not writable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): not cached; set data.cache_dir=DIR or XDG_CACHE_HOME to a different folder",
            path,
            error.strerror or error,
        )


# --- token ids: a safetensors file of flat arrays, named by its key -------


def read_arrays(path: Path) -> Arrays | None:
    """Read the arrays of a cache file. Returns `None` if it is missing, damaged or has a different key."""
    from safetensors import safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if (file.metadata() or {}).get(_METADATA) == _signature(arrays, path.stem):
                return arrays
        reason = "key or checksum mismatch"
    except Exception as error:  # an unknown dtype, an invalid header: no common type
        reason = first_line(error)
    discard(path, reason)
    return None


def write_arrays(path: Path, arrays: Arrays) -> None:
    from safetensors.numpy import save

    write_cache_file(path, save(arrays, metadata={_METADATA: _signature(arrays, path.stem)}))


def _signature(arrays: Arrays, key: str) -> str:
    value = zlib.crc32(key.encode())
    for name in sorted(arrays):
        value = zlib.crc32(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode(), value)
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8).data, value)
    return f"{key} {value:08x}"


# --- frozen features: the bytes of an array, and a checksum of the bytes, their shape and dtype, and the file's name


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
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize

    def read() -> NDArray[Any] | None:
        if not path.is_file():
            return None
        reason = "size or checksum mismatch"
        try:
            if path.stat().st_size == size + 4:
                states = np.memmap(path, dtype, mode="r", shape=shape)
                with path.open("rb") as file:
                    file.seek(size)
                    if int.from_bytes(file.read(), "little") == _checksum(states, path.name):
                        return states
        except OSError as error:
            reason = str(error)
        discard(path, reason)
        return None

    def write() -> NDArray[Any]:
        _make_room(path.parent, size, limit)
        with atomic_path(path) as partial:
            with partial.open("wb") as file:
                if hasattr(os, "posix_fallocate"):  # raises now if the disk is full, instead of crashing while writing
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
            states = np.memmap(partial, dtype, mode="r+", shape=shape)
            build(states)
            states.flush()
            with partial.open("ab") as file:
                file.write(_checksum(states, path.name).to_bytes(4, "little"))
                file.flush()
                os.fsync(file.fileno())
        return np.memmap(path, dtype, mode="r", shape=shape)

    states = read_or_build(path, read, write)
    with contextlib.suppress(OSError):  # files of other users can be read but not touched
        os.utime(path)
    return states


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

"""The user's cache: files that can be rebuilt and are written atomically, among them cached token ids."""

from __future__ import annotations

import contextlib
import logging
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fusion.errors import first_line
from fusion.files import remove_partial, write_atomic
from fusion.locks import lock

Arrays = dict[str, NDArray[Any]]

_WAIT = 3600.0  # seconds for another process to build a file

log = logging.getLogger(__name__)
Content = TypeVar("Content")

_METADATA = "key and crc32"  # a single entry: with more, their order and therefore the bytes of the file would vary


def user_cache() -> Path:
    """Return `$XDG_CACHE_HOME/adapter-fusion`, else `~/.cache/adapter-fusion`; XDG ignores relative paths."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "adapter-fusion"


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

"""The user's cache: files that can be rebuilt, each written completely or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fusion.files import remove_partial, write_atomic
from fusion.locks import lock

_WAIT = 3600.0  # seconds for another process to build a file

log = logging.getLogger(__name__)
Content = TypeVar("Content")


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/adapter-fusion`, else under `~/.cache`; the XDG standard ignores a relative path."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "adapter-fusion"


def read_or_build(path: Path, read: Callable[[], Content | None], build: Callable[[], Content]) -> Content:
    """The content of a cache file, which is built first if it is missing or damaged.

    If multiple processes need the same file, one builds it and the others wait. The lock only saves work: where
    the file system has none, or its holder takes longer than an hour, each process builds the file for itself.

    Args:
        read: returns None if the file is missing; `discard`s a damaged one.
    """
    content = read()
    if content is not None:
        return content
    lock_file = path.with_name(f"{path.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(lock_file, f"{path} is being written", _WAIT))
            # Removed before the release: a waiting process gets the lock of this file, and finds what was built.
            stack.callback(lock_file.unlink, missing_ok=True)
            remove_partial(path)
        except OSError as error:  # a timeout as well
            log.info("%s: no lock (%s)", path, error)
        content = read()  # another process may have built it
        return build() if content is None else content


def discard(path: Path, reason: str) -> None:
    log.warning("%s is damaged (%s): rebuilt", path, reason)
    with contextlib.suppress(OSError):
        path.unlink()


def write_cache_file(path: Path, content: bytes) -> None:
    """Write a file atomically; if its folder cannot be written, warn."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): not cached; data.cache_dir=DIR or XDG_CACHE_HOME selects another folder",
            path,
            error.strerror or error,
        )

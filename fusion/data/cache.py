"""The user's cache: files that can be made anew, written whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

log = logging.getLogger(__name__)


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/adapter-fusion`, else under `~/.cache`; the standard says to pass over a relative path."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "adapter-fusion"


def keep(path: Path, content: bytes, cure: str) -> None:
    """Write beside and rename: two writers make the same file, and nobody reads half of one.

    A folder that cannot be written costs the next run its time, and this one nothing but a warning.

    Args:
        cure: what the user can do about a folder that cannot be written.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        log.warning("%s cannot be written (%s): %s", path, error.strerror or error, cure)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """What a process left that was killed while it wrote this very file; only for who has the turn alone."""
    with contextlib.suppress(OSError):
        for left in path.parent.glob(f"{path.name}.*.partial"):
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def turn(path: Path, wait: float = 600.0, progress: Callable[[], object] | None = None) -> Iterator[bool]:
    """Holds the making of `path`, so that of several processes that miss it one makes it and the others read it.

    Look for the file again inside. It only saves work: where there can be no lock, or whoever holds it is not
    done within `wait` seconds, everybody makes the file for himself. The system ends a dead process's lock.

    Args:
        progress: what changes as long as whoever makes it gets on; then all wait for another `wait` seconds.

    Yields:
        Whether the turn is really ours alone.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another process is making %s: waiting for it", path)
            _acquire(lock, wait, progress)
    except Timeout:
        log.warning("%s: another process has been making it for %g s: not waiting any longer", path, wait)
    except (OSError, NotImplementedError):
        pass  # `keep` will say what is wrong with the folder; some network folders have no locks
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            # Before it is released. Who waits for this very file gets it and finds what was made.
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def _acquire(lock: BaseFileLock, wait: float, progress: Callable[[], object] | None) -> None:
    seen = progress() if progress else None
    while True:
        try:
            lock.acquire(timeout=wait)
            return
        except Timeout:
            before, seen = seen, progress() if progress else None
            if seen == before:
                raise

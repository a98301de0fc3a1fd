"""Locks between processes, on lock files: the operating system releases a lock when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

log = logging.getLogger(__name__)

LOCKS = ".locks"  # folder of a store


@contextlib.contextmanager
def lock(path: Path, what: str, wait: float = -1.0, progress: Callable[[], object] | None = None) -> Iterator[bool]:
    """Hold the lock file `path` inside the block. A note beside it names the process that holds it.

    Args:
        what: what the lock is for, in log messages: "films is being trained".
        wait: seconds to wait for another process; -1: as long as it takes.
        progress: `wait` starts again for as long as this value changes.

    Yields:
        Whether another process held the lock first.

    Raises:
        TimeoutError: another process has held it for `wait` seconds.
        OSError: the lock file cannot be written, or the file system has no locks.
    """
    from filelock import FileLock, Timeout  # not for --help: it imports asyncio

    path.parent.mkdir(parents=True, exist_ok=True)
    held, note, waited = FileLock(path), _note(path), False
    try:
        held.acquire(timeout=0)
    except Timeout:
        waited = True
        log.info("%s by %s: waiting", what, holder(path))
        seen = progress and progress()
        while not held.is_locked:
            try:
                held.acquire(timeout=wait)
            except Timeout:
                before, seen = seen, progress and progress()
                if seen == before:
                    raise TimeoutError(f"{what} by {holder(path)}: waited {wait:g} s") from None
    except NotImplementedError as error:
        raise OSError(str(error)) from None
    try:
        with contextlib.suppress(OSError):  # the note is for people
            since = datetime.now(timezone.utc).isoformat(timespec="seconds")
            content = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
            note.write_text(json.dumps(content), encoding="utf-8")
        yield waited
    finally:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)
        held.release()


@contextlib.contextmanager
def run_lock(store: Path, name: str) -> Iterator[bool]:
    """Hold the run called `name` in `store`, so that one process at a time trains it. Yields as `lock`.

    Where there can be no lock (a network folder without locks), log a warning and continue without one.
    """
    path, waited = run_lock_file(store, name), False
    with contextlib.ExitStack() as stack:
        try:
            waited = stack.enter_context(lock(path, f"{name} is being trained"))
        except OSError as error:
            log.warning("%s: no lock (%s), a second run of %s is possible", path, error.strerror or error, name)
        yield waited


def run_lock_file(store: Path, name: str) -> Path:
    """The lock file of `run_lock`. The lock of an artifact ends in `.lock`, so the two are distinct."""
    return store / LOCKS / f"{name}.run-lock"


def is_locked(path: Path) -> bool:
    """Whether another process holds a lock file; one that cannot be tested counts as free."""
    from filelock import FileLock, Timeout

    try:
        if path.is_file():
            FileLock(path).acquire(timeout=0).lock.release()
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        pass
    return False


def holder(path: Path) -> str:
    """The process that holds a lock file, for a message."""
    try:
        note = json.loads(_note(path).read_text(encoding="utf-8"))
        return f"process {note['pid']} on {note['host']} (since {note['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")

"""Locks between processes, on lock files: the operating system releases a lock when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from fusion.files import now, read_json, write_json

log = logging.getLogger(__name__)

LOCKS = ".locks"  # folder of a store


@contextlib.contextmanager
def lock(path: Path, what: str, wait: float = -1.0, progress: Callable[[], object] | None = None) -> Iterator[bool]:
    """Hold the lock file `path`, with a note beside it that names this process; yields whether another held it first.

    Args:
        what: for messages: "films is being trained".
        wait: seconds to wait for another process while `progress` stays the same; -1: as long as it takes.

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
            write_json(note, {"host": socket.gethostname(), "pid": os.getpid(), "since": now()})
        yield waited
    finally:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)
        held.release()


@contextlib.contextmanager
def run_lock(store: Path, name: str) -> Iterator[bool]:
    """`lock` of the run called `name`: one process at a time trains it. Where there can be no lock, warn."""
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
    note = read_json(_note(path))
    if not {"pid", "host", "since"} <= note.keys():
        return "another process"
    return f"process {note['pid']} on {note['host']} (since {note['since']})"


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")

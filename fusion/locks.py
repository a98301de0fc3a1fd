"""File locks between processes. The operating system releases a lock when its process exits or is killed."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from fusion.files import now, read_json, write_json

log = logging.getLogger(__name__)

LOCKS = ".locks"  # directory in a store


@contextlib.contextmanager
def lock(path: Path, what: str, wait: float = -1.0) -> Iterator[bool]:
    """Hold the lock file `path`. Yields whether another process held it first.

    A JSON file next to it has the host and process id of the holder. `what` is for messages: "films is being trained".
    Raises TimeoutError after `wait` seconds (-1: never), and OSError if the file cannot be written or locked.
    """
    from filelock import FileLock, Timeout  # not for --help: it imports asyncio

    path.parent.mkdir(parents=True, exist_ok=True)
    held, note, waited = FileLock(path), _note(path), False
    try:
        held.acquire(timeout=0)
    except Timeout:
        waited = True
        log.info("%s by %s; waiting for it to finish", what, holder(path))
        try:
            held.acquire(timeout=wait)
        except Timeout:
            raise TimeoutError(f"{what} by {holder(path)}; waited {wait:g} s") from None
    except NotImplementedError as error:
        raise OSError(str(error)) from None
    try:
        with contextlib.suppress(OSError):  # only used in messages
            write_json(note, {"host": socket.gethostname(), "pid": os.getpid(), "since": now()})
        yield waited
    finally:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)
        held.release()


@contextlib.contextmanager
def run_lock(store: Path, name: str) -> Iterator[bool]:
    """Lock the training run `name`. Logs a warning if the file system does not support locks."""
    path, waited = run_lock_file(store, name), False
    with contextlib.ExitStack() as stack:
        try:
            waited = stack.enter_context(lock(path, f"{name} is being trained"))
        except OSError as error:
            log.warning("%s cannot be locked (%s); do not start %s twice", path, error.strerror or error, name)
        yield waited


def run_lock_file(store: Path, name: str) -> Path:
    """Return the path of the lock file of a run. Locks of artifacts end in `.lock`, so the two never collide."""
    return store / LOCKS / f"{name}.run-lock"


def is_locked(path: Path) -> bool:
    """Return whether another process holds the lock file. Returns False if this cannot be determined."""
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
    """Describe the process that holds a lock file."""
    note = read_json(_note(path))
    if not {"pid", "host", "since"} <= note.keys():
        return "another process"
    return f"process {note['pid']} on {note['host']} (since {note['since']})"


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")

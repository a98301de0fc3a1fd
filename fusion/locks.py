"""One run of a name at a time: who comes second waits, and then finds it done or goes on with it.

The lock is the system's own, on a file beside the store's others, so that it ends with the process that holds
it. It is another than the one that the store takes to write an artifact, which a run does within its turn.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

LOCKS = ".locks"
POLL = 0.5  # seconds between two attempts


@contextlib.contextmanager
def turn_of(store: Path, name: str) -> Iterator[bool]:
    """Holds the run called `name` in `store`; waits, with one line that says for whom, while another has it.

    Where a lock cannot be had (a network folder without locks), it warns and goes on without.

    Yields:
        Whether it waited: the store may have the artifact by now.
    """
    from filelock import FileLock, Timeout  # not for --help: it brings asyncio

    # No artifact's own lock is called so: those end in .lock
    lock, note = store / LOCKS / f"{name}.run-lock", store / LOCKS / f"{name}.run-lock.json"
    held, waited = FileLock(lock), False
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=0)
        except Timeout:
            log.info("%s is being trained by %s: waiting", name, _holder(note))
            waited = True
            held.acquire(timeout=-1, poll_interval=POLL)
        _write(note)
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        log.warning("%s: no lock (%s), so that nothing keeps a second run of %s away", lock, reason, name)
    try:
        yield waited
    finally:
        if held.is_locked:
            with contextlib.suppress(OSError):
                note.unlink(missing_ok=True)
            held.release()


def _write(note: Path) -> None:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    holder: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    with contextlib.suppress(OSError):  # the lock counts without
        note.write_text(json.dumps(holder), encoding="utf-8")


def _holder(note: Path) -> str:
    """Who holds the lock, as far as its note says so: a dead process's note may still stand there."""
    try:
        holder = json.loads(note.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def is_held(store: Path, name: str) -> bool:
    """Whether another process trains the run called `name` right now, as far as its lock can be asked."""
    return is_locked(store / LOCKS / f"{name}.run-lock")


def holder_of(store: Path, name: str) -> str:
    """The process that trains the run called `name`, for a message."""
    return _holder(store / LOCKS / f"{name}.run-lock.json")


def is_locked(lock: Path) -> bool:
    """Whether another process holds a lock file; a lock that cannot be asked counts as free."""
    from filelock import FileLock, Timeout

    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return False

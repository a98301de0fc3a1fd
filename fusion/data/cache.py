"""The user's cache: files that can be made again, written whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from fusion.files import write_atomic
from fusion.locks import lock

log = logging.getLogger(__name__)


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/adapter-fusion`, else under `~/.cache`; a relative path is ignored, as the standard requires."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "adapter-fusion"


def keep(path: Path, content: bytes, fix: str) -> None:
    """Write a file of the cache; log a warning where that fails, since it only costs the next run its time.

    Args:
        fix: what the user can do about a folder that cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        log.warning("%s cannot be written (%s): %s", path, error.strerror or error, fix)


@contextlib.contextmanager
def cache_lock(
    path: Path, wait: float = 600.0, progress: Callable[[], object] | None = None
) -> Iterator[bool]:
    """Hold the lock of a cache file, so that one process makes it and the others read it.

    Look for the file again inside. The lock only saves work: where there can be none, or its holder makes no
    progress for `wait` seconds, each process makes the file itself.

    Args:
        progress: as of `fusion.locks.lock`.

    Yields:
        Whether the lock is held.
    """
    file, held = path.with_name(f"{path.name}.lock"), False
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(file, f"{path} is being written", wait, progress))
            held = True
            # Removed while it is held: a process that waits for this very file gets it, and finds what was made.
            stack.callback(file.unlink, missing_ok=True)
        except TimeoutError as error:
            log.warning("%s, not waiting any longer", error)
        except OSError:
            pass  # `keep` warns of a folder that cannot be written; some network folders have no locks
        yield held

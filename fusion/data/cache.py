"""The user's cache: files that can be made anew, written whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from pathlib import Path

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

"""Atomic file writes, and path checks for settings before anything is trained."""

from __future__ import annotations

import codecs
import contextlib
import functools
import glob
import json
import math
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.text import printable, shortened

PARTIAL = ".partial"  # suffix of a file that is being written
# Settings that are paths, or names or paths. `~` is expanded in the config for EXPANDED; the others are part of a run's
# identity as typed, and are expanded when they are read.
EXPANDED = ("store", "data.cache_dir", "input", "output", "trainer.default_root_dir", "runs")
KEPT = ("data.dir", "backbone.name_or_path", "artifact")


def user_cache() -> Path:
    """Return `$XDG_CACHE_HOME/adapter-fusion`, else `~/.cache/adapter-fusion`; XDG ignores relative paths."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "adapter-fusion"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` on exit, so that readers see the old or the new file."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically; strings are encoded as UTF-8."""
    with atomic_path(path) as part:
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def finite(value: Any) -> Any:
    """Return a copy of a JSON value with None for NaN and infinity, which JSON does not support."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically; values of other types are written as strings."""
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def now() -> str:
    """Return the current UTC time in ISO 8601 format, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Returns an empty dict if the file is missing or malformed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_text(path: object, content: bytes) -> str:
    """Decode UTF-8 and remove a byte order mark. Raises UserError with the line of the first invalid byte."""
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error


def remove_partial(path: Path) -> None:
    """Remove temporary files of killed writers of `path`. The caller must hold its lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        with contextlib.suppress(OSError):
            left.unlink(missing_ok=True)


def resolve_path(text: str, key: str) -> Path:
    """Return the path given by the setting `key`, with `~` expanded. Raises UserError if it is not a valid path."""
    try:
        if not text.strip():
            raise ValueError("is empty")
        path = Path(text).expanduser()
        with contextlib.suppress(FileNotFoundError):
            path.stat()
    except (OSError, RuntimeError, ValueError) as error:  # also an unknown user, NUL, or invalid characters
        problem = getattr(error, "strerror", None) or printable(str(error))
        raise UserError(f"{key}={shortened(text, 300)}: {problem}; expected a path, such as {key}=DIR") from None
    return path


def expand_paths(config: Any) -> None:
    """Check every path of a typed config and expand `~` in the settings of EXPANDED."""
    for key in (*EXPANDED, *KEPT):
        *groups, name = key.split(".")
        owner = functools.reduce(lambda owner, group: getattr(owner, group, None), groups, config)
        value = getattr(owner, name, None)
        texts = value if isinstance(value, list) else [value] if isinstance(value, str) else []
        for text in texts:
            resolve_path(text, key)
        if key in EXPANDED and texts:
            expanded = [os.path.expanduser(text) for text in texts]
            setattr(owner, name, expanded if isinstance(value, list) else expanded[0])


def check_writable(text: str, key: str) -> Path:
    """Return the output directory given by `key`, without creating it. Raises UserError if it is not writable."""
    folder = resolve_path(text, key)
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    try:
        # Permission bits do not reveal a read-only disk, and an empty file can be created on a full one.
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        raise unwritable(key, folder, error) from error
    return folder


def unwritable(key: str, place: Path | str, error: OSError) -> UserError:
    """Return the error for an output directory that cannot be written."""
    return UserError(
        f"{key}={place}: cannot be written ({error.strerror or error}); set {key}=DIR to a different directory"
    )


def check_relative(name: str) -> str | None:
    """Return why a name could refer to a path outside of its directory, or None if it cannot."""
    parts = re.split(r"[/\\]", name)
    if not name or "\0" in name or "" in parts or {".", ".."} & set(parts) or re.match(r"[A-Za-z]:", name):
        return "expected a name or names joined by /, without .."
    return None

"""Files, directories and names of a store.

An artifact is a directory STORE/NAME with `manifest.json`, `weights.safetensors` and `head.safetensors`. Directories
that start with a dot are internal: `.runs` (checkpoints), `.replaced` (overwritten artifacts that a fusion depends
on), `.staging` (artifacts that are being written) and `.locks`.
"""

from __future__ import annotations

import re
from pathlib import Path

from fusion.errors import UserError

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
HEAD = "head.safetensors"
REPLACED, STAGING, RUNS = ".replaced", ".staging", ".runs"
# Suffixes in STAGING. Names of artifacts contain no tilde.
NEW, OLD, REMOVED = "~new", ".old", "~removed"
FIX = "copy the artifact again or retrain it with overwrite=true"


def is_name(text: str) -> bool:
    """Return whether this is a valid artifact name, which is never a path."""
    return re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{,98}[A-Za-z0-9_-])?", text) is not None


def check_name(name: str) -> None:
    """Raise UserError if `is_name` returns False."""
    if not is_name(name):
        raise UserError(
            f"name={name[:100]!r}: expected at most 100 letters, digits, '.', '_' or '-', starting with a letter or "
            "digit, and not ending with '.'"
        )


def check_regular(path: Path, expected: int | None = None) -> None:
    """Raise UserError if a path is missing or not a regular file, or its size is not `expected`."""
    if not path.is_file():
        raise UserError(f"{path} is missing or not a regular file; {FIX}")
    if expected not in (None, size := path.stat().st_size):
        raise UserError(f"{path}: has {size:,} bytes, expected {expected:,}; {FIX}")


def read_regular(path: Path, expected: int | None = None) -> bytes:
    """Read a file. Raises UserError if it is unreadable, or like `check_regular`."""
    try:
        check_regular(path, expected)
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {FIX}") from None

"""Files, folders and names of a store.

An artifact is a folder STORE/NAME with `manifest.json`, `weights.safetensors` and `head.safetensors`. Folders whose
names start with a dot are internal to the store: `.runs` (checkpoints), `.replaced` (overwritten artifacts that a
fusion still needs), `.staging` (artifacts that are being written), `.locks`.
"""

from __future__ import annotations

import re
from pathlib import Path

from fusion.errors import UserError

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
HEAD = "head.safetensors"
REPLACED, STAGING, RUNS = ".replaced", ".staging", ".runs"
# Endings of an artifact's name in STAGING. No name contains a tilde.
NEW, OLD, COPY, REMOVED = "~new", ".old", "~copy", "~removed"
FIX = "copy the artifact again, or train it again with overwrite=true"

NAME_LENGTH = 100
# Names that Windows reserves for devices, with or without an ending.
RESERVED = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)}


def is_name(text: str) -> bool:
    """Whether an artifact may have this name: never a path, and possible on every common file system."""
    allowed = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) is not None and not text.endswith(".")
    return allowed and len(text) <= NAME_LENGTH and text.split(".")[0].lower() not in RESERVED


def check_name(name: str) -> None:
    """Refuse what `is_name` does not allow."""
    if not is_name(name):
        raise UserError(
            f"name={name[:NAME_LENGTH]!r}: not a name for the store. Letters, digits, '.', '_' and '-' are allowed, a "
            f"letter or digit first, no '.' last, at most {NAME_LENGTH} characters, no device name of Windows"
        )


def read_regular(path: Path, expected: int | None = None) -> bytes:
    """The content of a file; UserError if it is missing, of another size, or a pipe or device, which could block."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: is missing, or no regular file; {FIX}")
        if expected not in (None, size := path.stat().st_size):
            raise UserError(f"{path}: has {size:,} bytes, expected {expected:,}; {FIX}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {FIX}") from None

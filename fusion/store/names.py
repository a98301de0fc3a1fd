"""Which names an artifact may have."""

from __future__ import annotations

import re

from fusion.errors import UserError

NAME_LENGTH = 100
# Names that Windows keeps for devices, with or without an ending.
RESERVED = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)}


def check_name(name: str) -> None:
    """Refuses a name that would leave the store, or that some file system cannot hold.

    Raises:
        UserError: says what a name may be.
    """
    allowed = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None and not name.endswith(".")
    reserved = name.split(".")[0].lower() in RESERVED
    if not allowed or reserved or len(name) > NAME_LENGTH:
        shown = name if len(name) <= NAME_LENGTH else name[:NAME_LENGTH] + "…"
        why = " (the name of a device on Windows)" if reserved else ""
        raise UserError(
            f"name={shown!r}: not a name for the store{why}. Letters, digits, '.', '_' and '-' are allowed, "
            f"a letter or digit first, no '.' last, at most {NAME_LENGTH} characters"
        )


def is_name(reference: str) -> bool:
    """Whether `reference` could be a name in the store (and not only a path)."""
    try:
        check_name(reference)
    except UserError:
        return False
    return True

"""Reading a file of the store without trusting it: a regular file, of a bounded size, read once."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fusion.errors import UserError

MEND = "copy the artifact again, or train it again with overwrite=true"


def read_regular(path: Path, expected: int | None = None, most: int | None = None) -> bytes:
    """The content of a file that must be a file and no folder, pipe or device.

    Args:
        expected: its bytes, exactly.
        most: the most that it may have.

    Raises:
        UserError: it is not there, not readable, no regular file, or of another size.
    """
    try:
        # Opening a pipe that nobody writes to would wait for ever; a device may have no end.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            state = os.fstat(descriptor)
            _check(path, state, expected, most)
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(state.st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {MEND}") from None
    except MemoryError:
        raise UserError(f"{path}: does not fit into this machine's memory; {MEND}") from None
    if len(content) != state.st_size:
        raise UserError(f"{path}: was cut short while it was read ({len(content):,} bytes); {MEND}")
    return content


def _check(path: Path, state: os.stat_result, expected: int | None, most: int | None) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise UserError(f"{path}: is no regular file; {MEND}")
    if expected is not None and state.st_size != expected:
        raise UserError(f"{path}: is {state.st_size:,} bytes of {expected:,}; {MEND}")
    if most is not None and state.st_size > most:
        raise UserError(f"{path}: is {state.st_size:,} bytes, and at most {most:,} are read; {MEND}")

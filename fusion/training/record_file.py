"""JSON lines that a run writes as it goes: whole lines only, and no reason to stop when the disk is full."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class RecordFile:
    """A file of one JSON object a line, made with its first line; whoever reads it meanwhile sees whole lines.

    A file that is there already (of a folder that was named for a second run) is begun anew. After the first line
    that cannot be written it says so once, takes back what it wrote of it, and writes no more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begun = False
        self._ended = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line; NaN and infinities become null."""
        if self._ended:
            return
        line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False, default=str)
        try:
            self._append(f"{line}\n".encode())
        except OSError as error:
            self._ended = True
            reason = error.strerror or error
            log.warning("%s: cannot be written any more (%s); training goes on without it", self.path, reason)

    def _append(self, line: bytes) -> None:
        if not self._begun:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        begin = os.O_APPEND if self._begun else os.O_TRUNC
        # Opened for each line, which costs some microseconds: nothing to close when a run is killed or fails.
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | begin, 0o666)
        try:
            before, written = os.fstat(file).st_size, 0
            try:
                while written < len(line):  # a disk with a little room takes a part
                    written += os.write(file, line[written:])
            except OSError:
                os.ftruncate(file, before)
                raise
        finally:
            os.close(file)
        self._begun = True


def finite(value: Any) -> Any:
    """The same with None for each number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""JSON Lines files that are written during a run: whole lines only; a full disk does not stop the run."""

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
    """A file with one JSON object per line, created with the first line; an existing file is overwritten.

    If a line cannot be written, a warning is logged, the partial line is removed and nothing more is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = 0
        self._failed = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; NaN and infinities become null."""
        if self._failed:
            return
        line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False, default=str)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened for each line, which takes microseconds: nothing to close when the run is killed.
            with open(self.path, "ab" if self._size else "wb", buffering=0) as file:
                self._append(file.fileno(), f"{line}\n".encode())
        except OSError as error:
            self._failed = True
            reason = error.strerror or error
            log.warning(
                "%s: cannot be written any more (%s); training continues without it", self.path, reason
            )

    def _append(self, descriptor: int, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):  # an almost full disk takes a part
                written += os.write(descriptor, line[written:])
        except OSError:
            os.ftruncate(descriptor, self._size)
            raise
        self._size += len(line)


def finite(value: Any) -> Any:
    """The same with None for each NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""JSON Lines files that are written during a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion.files import finite

log = logging.getLogger(__name__)


class RecordFile:
    """A file with one JSON object per line, created with the first line; an existing file is overwritten.

    If a line cannot be written, a warning is logged and nothing more is written; readers ignore a partial line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mode = "w"

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; NaN and infinities become null."""
        if not self._mode:
            return
        line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False, default=str)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened for each line, which takes microseconds: nothing to close when the run is killed.
            with open(self.path, self._mode, encoding="utf-8") as file:
                file.write(f"{line}\n")
            self._mode = "a"
        except OSError as error:
            self._mode = ""
            reason = error.strerror or error
            log.warning("%s: cannot be written (%s); training continues without it", self.path, reason)

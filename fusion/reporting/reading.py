"""Read run folders: what each run was, its result, and its records.

A folder that is damaged or incomplete is skipped and named; the others are read.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion.errors import UserError, first_line
from fusion.runs.run import CONFIG, HISTORY, INSPECTION, RESULT, STATUS
from fusion.store.compatibility import DEBUG


@dataclass(frozen=True)
class RunFolder:
    """A finished run. config: resolved. result: the content of result.json."""

    folder: Path
    command: str
    overrides: tuple[str, ...]
    ended: str
    skipped: bool
    config: dict[str, Any]
    result: dict[str, Any]


@dataclass
class Found:
    """
    done: by time of their end. others: the number of runs by other status. failed: those that failed, and why.
    debug: the number of omitted debug= runs. unread: what could not be read, and why.
    histories: by the identity of a training, the folders with a part of its history, in order of their start.
    inspections: by the hash of the fusion, the last one.
    """

    done: list[RunFolder] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    debug: int = 0
    unread: list[str] = field(default_factory=list)
    histories: dict[str, list[Path]] = field(default_factory=dict)
    inspections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def history(self, folder: Path) -> list[dict[str, Any]]:
        """The records of a training step by step: of this folder, and of its interrupted parts before it."""
        parts = next((parts for parts in self.histories.values() if folder in parts), [folder])
        return [line for part in parts for line in read_lines(part / HISTORY)]


def read_runs(folders: Sequence[Path], without: Path | None = None) -> Found:
    """All runs below the folders; a folder may be a run itself, and each run counts once.

    Args:
        without: the folder of a run to omit.

    Raises:
        UserError: there is no run below any of the folders.
    """
    found = Found()
    places: dict[Path, None] = {}
    inspections: dict[Path, None] = {}
    for folder in folders:
        for place, inner, files in os.walk(folder):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            if STATUS in files:
                places[Path(place).resolve()] = None
            if INSPECTION in files:
                inspections[(Path(place) / INSPECTION).resolve()] = None
    if without is not None:
        places.pop(without.resolve(), None)
    for path in places:
        _read(path, found)
    found.histories = _histories(places)
    for path in sorted(inspections, key=lambda path: path.stat().st_mtime):
        try:
            inspection = read_json(path)
            found.inspections[str(inspection["hash"])] = inspection
        except (OSError, ValueError, KeyError) as error:
            found.unread.append(f"{path}: {first_line(error)}")
    if not found.done and not found.others and not found.unread:
        raise UserError(f"runs={','.join(map(str, folders))}: contains no run (a folder with a {STATUS})")
    found.done.sort(key=lambda run: (run.ended, str(run.folder)))
    return found


def _histories(places: Iterable[Path]) -> dict[str, list[Path]]:
    started: dict[str, list[tuple[str, Path]]] = {}
    for place in places:
        header = next(iter(read_lines(place / HISTORY, at_most=1)), {})
        if isinstance(name := header.get("run"), str):
            started.setdefault(name, []).append((str(header.get("started")), place))
    return {name: [place for _, place in sorted(parts)] for name, parts in started.items()}


def _read(folder: Path, found: Found) -> None:
    import yaml

    try:
        status = read_json(folder / STATUS)
        state = str(status.get("status"))
        if state != "done":
            found.others[state] = found.others.get(state, 0) + 1
            if state == "failed":
                found.failed.append(f"{folder}: {first_line(Exception(str(status.get('error'))))}")
            return
        result = read_json(folder / RESULT)
        text = (folder / CONFIG).read_text(encoding="utf-8")
        config = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text).get_single_data()
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} is not a mapping")
        if str(result.get("name")).endswith(DEBUG):
            found.debug += 1
            return
        overrides = status.get("overrides")
        words = tuple(map(str, overrides if isinstance(overrides, list) else []))
        command, ended, skipped = str(status.get("command")), str(status.get("ended")), status.get("before")
        found.done.append(RunFolder(folder, command, words, ended, skipped == "done", config, result))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        found.unread.append(f"{folder}: {first_line(error)}")


def read_lines(path: Path, at_most: int | None = None) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, without truncated lines; empty if it cannot be read."""
    found: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                content = json.loads(line)
                found += [content] if isinstance(content, dict) else []
            if at_most is not None and len(found) >= at_most:
                break
    return found


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        OSError, ValueError: it cannot be read, or is not a JSON object.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content

"""Read run directories: status, config, result and records. Damaged or incomplete ones are skipped and listed."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion.errors import UserError, first_line
from fusion.runs.run import CONFIG, HISTORY, INSPECTION, RESULT, STATUS
from fusion.store.compatibility import DEBUG


@dataclass(frozen=True)
class RunFolder:
    """A finished run, with its resolved config and the content of result.json."""

    folder: Path
    command: str
    overrides: tuple[str, ...]
    ended: str
    skipped: bool
    config: dict[str, Any]
    result: dict[str, Any]


@dataclass
class Found:
    done: list[RunFolder] = field(default_factory=list)  # sorted by end time
    others: Counter[str] = field(default_factory=Counter)  # number of unfinished runs by status
    failed: list[str] = field(default_factory=list)  # failed runs with their errors
    debug: int = 0  # number of omitted debug= runs
    unread: list[str] = field(default_factory=list)  # errors of files that could not be read
    histories: dict[str, list[Path]] = field(default_factory=dict)  # directories of each resumed run, by start time
    inspections: dict[str, dict[str, Any]] = field(default_factory=dict)  # the last one of each fusion, by hash

    def history(self, folder: Path) -> list[dict[str, Any]]:
        """Return the logged records of a training run, including the parts before it was resumed."""
        parts = next((parts for parts in self.histories.values() if folder in parts), [folder])
        return [line for part in parts for line in read_lines(part / HISTORY)]


def read_runs(folders: Sequence[Path], without: Path | None = None) -> Found:
    """Read all runs in and below the given directories, except `without`. Raises UserError if no run is found."""
    found = Found()
    places: dict[str, dict[Path, None]] = {STATUS: {}, INSPECTION: {}}  # the directories that contain each file
    for folder in folders:
        for place, inner, files in os.walk(folder):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for name in places.keys() & set(files):
                places[name][Path(place).resolve()] = None
    if without is not None:
        places[STATUS].pop(without.resolve(), None)
    for path in places[STATUS]:
        try:
            _read_run(path, found)
        except UserError as error:
            found.unread.append(str(error))
    found.histories = _histories(places[STATUS])
    for path in sorted((path / INSPECTION for path in places[INSPECTION]), key=lambda path: path.stat().st_mtime):
        try:
            inspection = read_mapping(path)
            found.inspections[str(inspection["hash"])] = inspection
        except (UserError, KeyError) as error:
            found.unread.append(f"{path}: missing key hash" if isinstance(error, KeyError) else str(error))
    if not found.done and not found.others and not found.unread:
        raise UserError(f"runs={','.join(map(str, folders))}: no runs found (a run is a folder with a {STATUS})")
    found.done.sort(key=lambda run: (run.ended, str(run.folder)))
    return found


def _histories(places: Iterable[Path]) -> dict[str, list[Path]]:
    started = defaultdict(list)
    for place in places:
        header = next(read_lines(place / HISTORY), {})
        if isinstance(name := header.get("run"), str):
            started[name].append((str(header.get("started")), place))
    return {name: [place for _, place in sorted(parts)] for name, parts in started.items()}


def _read_run(folder: Path, found: Found) -> None:
    status = read_mapping(folder / STATUS)
    if (state := str(status.get("status"))) != "done":
        found.others[state] += 1
        if state == "failed":
            found.failed.append(f"{folder}: {first_line(Exception(str(status.get('error'))))}")
        return
    result, config = read_mapping(folder / RESULT), read_mapping(folder / CONFIG)
    if str(result.get("name")).endswith(DEBUG):
        found.debug += 1
        return
    overrides, skipped = tuple(map(str, status.get("overrides") or ())), status.get("before") == "done"
    command, ended = str(status.get("command")), str(status.get("ended"))
    found.done.append(RunFolder(folder, command, overrides, ended, skipped, config, result))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file. Truncated lines and unreadable files are skipped."""
    with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                if isinstance(content := json.loads(line), dict):
                    yield content


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a mapping from a JSON or YAML file. Raises UserError if it cannot be read or is not a mapping."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content = loader(text).get_single_data() if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of keys to values")
    return content

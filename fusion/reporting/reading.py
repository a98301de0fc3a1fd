"""Run folders as they lie on the disk: what each run was, what it gave, and what it left to look at.

Whatever is damaged or half there is left out and named, so that one bad folder does not cost the others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion.errors import UserError, first_line
from fusion.runs.run import CONFIG, HISTORY, INSPECTION, RESULT, STATUS
from fusion.store.compatibility import DEBUG

_LARGEST = 256 * 2**20  # bytes of a file that are read


@dataclass(frozen=True)
class RunFolder:
    """A run that is done.

    config: resolved. result: what result.json holds.
    """

    folder: Path
    command: str
    overrides: tuple[str, ...]
    ended: str
    skipped: bool
    config: dict[str, Any]
    result: dict[str, Any]

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of a JSON lines file; empty where it is not there."""
        return read_lines(self.folder / name)

    def json(self, name: str) -> dict[str, Any] | None:
        """The object of a JSON file; None: it is not there or is damaged."""
        try:
            content = read_json(self.folder / name)
        except (OSError, ValueError):
            return None
        return content


@dataclass
class Found:
    """
    done: by time of their end. others: how many runs have another status. failed: those that failed, and why.
    debug: how many of debug= were left out. unread: what could not be read, and why.
    histories: by what a training calls itself, the folders in which it left a part, in the order of their beginning.
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
        """What a training noted, step by step: in this folder, and before it in those of its interrupted turns."""
        parts = next((parts for parts in self.histories.values() if folder in parts), [folder])
        return [line for part in parts for line in read_lines(part / HISTORY)]


def read_runs(folders: Sequence[Path], without: Path | None = None) -> Found:
    """All runs below the folders; a folder may be a run itself, and one that is reached twice counts once.

    Args:
        without: the folder of a run that does not count.

    Raises:
        UserError: a folder is not there, or no run lies below any of them.
    """
    found = Found()
    places: dict[Path, None] = {}
    inspections: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"runs={folder}: no such folder; expected one that runs were written to, such as runs=outputs"
            )
        for place, files in _walk(folder):
            if STATUS in files:
                places.setdefault(place.resolve(), None)
            if INSPECTION in files:
                inspections.setdefault((place / INSPECTION).resolve(), None)
    if without is not None:
        places.pop(without.resolve(), None)
    for place in places:
        _read(place, found)
    _gather_histories(places, found)
    for path in sorted(inspections, key=lambda path: path.stat().st_mtime):
        try:
            inspection = read_json(path)
            found.inspections[str(inspection["hash"])] = inspection
        except (OSError, ValueError, KeyError) as error:
            found.unread.append(f"{path}: {first_line(error)}")
    if not found.done and not found.others and not found.unread:
        said = ",".join(map(str, folders))
        raise UserError(
            f"runs={said}: there is no run in it (a folder with a {STATUS}); train something first"
        )
    found.done.sort(key=lambda run: (run.ended, str(run.folder)))
    return found


def _walk(top: Path) -> Iterator[tuple[Path, list[str]]]:
    for place, inner, files in os.walk(top):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield Path(place), files


def _gather_histories(places: Iterable[Path], found: Found) -> None:
    begun: dict[str, list[tuple[str, Path]]] = {}
    for place in places:
        header = next(iter(read_lines(place / HISTORY, at_most=1)), {})
        if isinstance(name := header.get("run"), str):
            begun.setdefault(name, []).append((str(header.get("started")), place))
    found.histories = {name: [place for _, place in sorted(parts)] for name, parts in begun.items()}


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
        with open(folder / CONFIG, encoding="utf-8") as file:
            config = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(file).get_single_data()
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} is no mapping")
        if str(result.get("name")).endswith(DEBUG):
            found.debug += 1
            return
        overrides = status.get("overrides")
        found.done.append(
            RunFolder(
                folder=folder,
                command=str(status.get("command")),
                overrides=tuple(map(str, overrides if isinstance(overrides, list) else [])),
                ended=str(status.get("ended")),
                skipped=status.get("before") == "done",
                config=config,
                result=result,
            )
        )
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        found.unread.append(f"{folder}: {first_line(error)}")


def read_lines(path: Path, at_most: int | None = None) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; empty where it cannot be read. A line that is cut off is left out."""
    found: list[dict[str, Any]] = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    content = json.loads(line)
                except ValueError:
                    continue
                if isinstance(content, dict):
                    found.append(content)
                if at_most is not None and len(found) >= at_most:
                    break
    except (OSError, UnicodeDecodeError):
        return []
    return found


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        OSError, ValueError: it cannot be read, or is no JSON object.
    """
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path.name} is too large")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return content

"""What a store holds, found by manifests alone: sound artifacts, damaged ones, and what runs have left.

No torch: a store is looked at in an instant.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from fusion.locks import LOCKS, holder, is_locked, run_lock_file
from fusion.store.layout import MANIFEST, OLD, REPLACED, STAGING
from fusion.store.lookup import folders, read_folder, read_settled
from fusion.store.names import is_name

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

RUNS = ".runs"


@dataclass(frozen=True)
class Found:
    """A folder that is or should be an artifact.

    place: below the store, `mnli` or `.replaced/mnli-0123abcd`. Either manifest or problem is there.
    """

    place: str
    folder: Path
    manifest: Manifest | None
    problem: str = ""

    @property
    def replaced(self) -> bool:
        return self.place.startswith(".")


@dataclass(frozen=True)
class Leftover:
    """What a run or a writer has left in the store. `done`: the artifact that it was for is stored."""

    place: str
    folder: Path
    what: str
    done: bool


def check_store(store: Path) -> None:
    """Refuses a store that is not there.

    Raises:
        UserError: names it, and how to name another.
    """
    if not store.is_dir():
        raise UserError(
            f"store={store}: there is no such folder; say store=DIR for another, or train something"
        )


def everything(store: Path, only: str | None = None) -> list[Found]:
    """All artifacts by name, then those that were replaced; damaged ones too. `only`: just that place."""
    standing = {
        entry.name: entry for entry in _entries(store) if entry.is_dir() and not entry.name.startswith(".")
    }
    places = sorted((standing | folders(store)).items())
    places += [(f"{REPLACED}/{folder.name}", folder) for folder in _entries(store / REPLACED)]
    return [_look(place, folder, store) for place, folder in places if only in (None, place)]


def _look(place: str, folder: Path, store: Path) -> Found:
    def where() -> Path:  # one that is just being replaced lies elsewhere for a moment
        return folder if (folder / MANIFEST).is_file() else folders(store).get(place, folder)

    try:
        if not (where() / MANIFEST).exists():
            read_folder(
                folder
            )  # nothing is being replaced here, so nothing is waited for: says what is wrong
        there, manifest = read_settled(where, lambda there: (there, read_folder(there)))
    except UserError as error:
        return Found(place, folder, None, str(error))
    if not is_name(folder.name.removesuffix(OLD)):
        return Found(place, folder, None, f"{folder}: this is no name for the store; give the folder another")
    return Found(place, there, manifest)


def leftovers(store: Path, found: list[Found]) -> Iterator[Leftover]:
    """Checkpoints of runs that are not done, and of runs that are; what a writer that was killed left."""
    identities = {f"{f.place}-{f.manifest.run.identity}" for f in found if f.manifest and not f.replaced}
    for folder in _entries(store / RUNS):
        name = folder.name.rpartition("-")[0]
        if name and is_locked(
            run_lock_file(store, name)
        ):  # its lock is asked first: an overwrite has the identity of what is stored
            yield Leftover(f"{RUNS}/{folder.name}", folder, _running(store, name, folder), False)
            continue
        done = folder.name in identities
        yield Leftover(
            f"{RUNS}/{folder.name}",
            folder,
            "checkpoints of a run that is done" if done else _attempted(folder),
            done,
        )
    for folder in _entries(store / STAGING):
        being_written = re.sub(r"(~new|~removed|\.old)$", "", folder.name)
        if is_locked(store / LOCKS / f"{being_written}.lock"):
            yield Leftover(f"{STAGING}/{folder.name}", folder, "running: it is being written now", False)
            continue
        whole = folder.name.endswith(OLD) and (folder / MANIFEST).is_file()
        name = folder.name.removesuffix(OLD)
        there = (store / name / MANIFEST).is_file()
        if whole and not there:
            yield Leftover(
                f"{STAGING}/{folder.name}",
                folder,
                f"all there is of {name}; the next writer puts it back",
                False,
            )
        else:
            yield Leftover(f"{STAGING}/{folder.name}", folder, "half-written by a process that ended", True)


def _running(store: Path, name: str, run: Path) -> str:
    """What is said of a run whose lock is held: the lock is by name, so it may be held for another identity."""
    attempt = _last_attempt(run)
    if attempt.get("status") in ("failed", "interrupted"):
        return f"{_attempted(run)}; {name} is being trained now ({holder(run_lock_file(store, name))})"
    return f"running: it is being trained now by {holder(run_lock_file(store, name))}"


def _last_attempt(run: Path) -> dict[str, Any]:
    try:
        attempt = json.loads((run / "attempt.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return attempt if isinstance(attempt, dict) else {}


def _attempted(run: Path) -> str:
    """What became of a run that is not done, by its own last word."""
    if _last_attempt(run).get("status") == "failed":
        return "a run that failed; the same command tries it again"
    return "an interrupted run; the same command goes on with it"


def users_of(hash: str, found: list[Found]) -> list[str]:
    """The fusions of a store that have the artifact of this hash as a source, by name."""
    return [
        f.place
        for f in found
        if f.manifest is not None and any(source.hash == hash for source in f.manifest.sources)
    ]


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += 0 if path.is_dir() else path.lstat().st_size
    return total


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []

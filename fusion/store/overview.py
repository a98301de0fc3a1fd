"""Store-wide questions that manifests answer: which fusions use an artifact, what runs and writers have left. No torch."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.locks import holder, is_locked, run_lock_file
from fusion.store.layout import MANIFEST, OLD, RUNS, STAGING
from fusion.store.lookup import Found, entries
from fusion.store.writing import artifact_lock


@dataclass(frozen=True)
class Leftover:
    """What a run or a writer has left in the store.

    Attributes:
        done: nothing needs it any more.
    """

    place: str
    folder: Path
    what: str
    done: bool


def check_store(store: Path) -> None:
    """Refuse a store that does not exist.

    Raises:
        UserError: names it.
    """
    if not store.is_dir():
        raise UserError(
            f"store={store}: there is no such folder; store=DIR names another, training creates one"
        )


def users_of(hash: str, found: Sequence[Found]) -> list[str]:
    """The fusions that have the artifact with this hash as a source."""
    return [
        f.place for f in found if f.manifest and any(source.hash == hash for source in f.manifest.sources)
    ]


def leftovers(store: Path, found: Sequence[Found]) -> Iterator[Leftover]:
    """Checkpoints of runs, finished or not, and what killed writers left."""
    done = {f"{f.place}-{f.manifest.run.identity}" for f in found if f.manifest and not f.replaced}
    for folder in entries(store / RUNS):
        what, is_done = _run(store, folder, folder.name in done)
        yield Leftover(f"{RUNS}/{folder.name}", folder, what, is_done)
    for folder in entries(store / STAGING):
        what, is_done = _staged(store, folder)
        yield Leftover(f"{STAGING}/{folder.name}", folder, what, is_done)


def _run(store: Path, folder: Path, stored: bool) -> tuple[str, bool]:
    # The lock first: a run that overwrites an artifact may have the identity of the stored one.
    name = folder.name.rpartition("-")[0]
    path = run_lock_file(store, name)
    running = f"is being trained now by {holder(path)}" if name and is_locked(path) else ""
    status = _attempt(folder).get("status")
    if running and status not in ("failed", "interrupted"):
        return f"running: it {running}", False
    if stored and not running:
        return "checkpoints of a run that is done", True
    text = "a run that failed" if status == "failed" else "an interrupted run"
    text += "; the same command resumes it"
    # The lock is of the name: it may be held for a run of another identity.
    return f"{text}; {name} {running}" if running else text, False


def _attempt(folder: Path) -> dict[str, Any]:
    try:
        attempt = json.loads((folder / "attempt.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return attempt if isinstance(attempt, dict) else {}


def _staged(store: Path, folder: Path) -> tuple[str, bool]:
    if is_locked(artifact_lock(store, re.sub(r"(~\w+|\.old)$", "", folder.name))):
        return "running: it is being written now", False
    name = folder.name.removesuffix(OLD)
    only_copy = (
        folder.name != name and (folder / MANIFEST).is_file() and not (store / name / MANIFEST).is_file()
    )
    if only_copy:
        return f"the only copy of {name}; the next writer restores it", False
    return "half-written by a process that ended", True


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += 0 if path.is_dir() else path.lstat().st_size
    return total

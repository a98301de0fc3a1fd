"""Checkpoints of runs, finished or not, and files of killed writers in a store. No torch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fusion.files import read_json
from fusion.locks import holder, is_locked, run_lock_file
from fusion.store.layout import MANIFEST, OLD, RUNS, STAGING
from fusion.store.lookup import Found, entries
from fusion.store.writing import artifact_lock


class Leftover(NamedTuple):
    """A folder of the store that is not an artifact; `done`: nothing needs it any more."""

    folder: Path
    what: str
    done: bool

    @property
    def place(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def size(self) -> int:
        return size_of(self.folder)


def leftovers(store: Path, found: Sequence[Found]) -> Iterator[Leftover]:
    """All leftovers of a store; `found`: its artifacts."""
    done = {f"{f.place}-{f.manifest.run.identity}" for f in found if f.manifest and not f.replaced}
    for folder in entries(store / RUNS):
        yield Leftover(folder, *_run(store, folder, folder.name in done))
    for folder in entries(store / STAGING):
        yield Leftover(folder, *_staged(store, folder))


def _run(store: Path, folder: Path, stored: bool) -> tuple[str, bool]:
    # The lock first: a run that overwrites an artifact may have the identity of the stored one.
    name = folder.name.rpartition("-")[0]
    path = run_lock_file(store, name)
    running = f"is being trained now by {holder(path)}" if name and is_locked(path) else ""
    status = read_json(folder / "attempt.json").get("status")
    if running and status not in ("failed", "interrupted"):
        return f"running: it {running}", False
    if stored and not running:
        return "checkpoints of a run that is done", True
    text = "a run that failed" if status == "failed" else "an interrupted run"
    text += "; the same command resumes it"
    # The lock is of the name: it may be held for a run of another identity.
    return f"{text}; {name} {running}" if running else text, False


def _staged(store: Path, folder: Path) -> tuple[str, bool]:
    name = re.sub(r"(~\w+|\.old)$", "", folder.name)
    if is_locked(artifact_lock(store, name)):
        return "running: it is being written now", False
    if folder.name.endswith(OLD) and (folder / MANIFEST).is_file() and not (store / name / MANIFEST).is_file():
        return f"the only copy of {name}; the next writer restores it", False
    return "half-written by a process that ended", True


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += 0 if path.is_dir() else path.lstat().st_size
    return total

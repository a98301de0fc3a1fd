"""`verify`: every file of a store is read again, and held against what its manifest says."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion.errors import UserError
from fusion.locks import LOCKS, is_locked
from fusion.store.artifacts import Artifact, check_numbers, match_keys, read
from fusion.store.files import MEND
from fusion.store.layout import HEAD, MANIFEST, WEIGHTS
from fusion.store.listing import as_bytes
from fusion.store.lookup import READS, source_manifests, stamp, unknown_name
from fusion.store.manifest import Manifest
from fusion.store.overview import Found, check_store, everything, leftovers, size_of
from fusion.text import printable


@dataclass(frozen=True)
class Verdict:
    """One line of `verify`. problem: empty where all is well. note: what could not be checked."""

    place: str
    problem: str = ""
    note: str = ""

    def __str__(self) -> str:
        return printable(
            f"problem  {self.place}: {' '.join(self.problem.split())}"
            if self.problem
            else f"ok       {self.place}{self.note}"
        )


Shapes = Callable[[Manifest, Sequence[Manifest], Path], Mapping[str, Mapping[str, tuple[int, ...]] | None]]
"""From a manifest, those of its sources and the artifact's folder to the tensors that each of its files must hold.

None for a file of which the manifest cannot tell. It raises UserError where a manifest describes no model.
"""


def verify(store: Path, shapes: Shapes, name: str | None = None) -> Iterator[Verdict]:
    """One verdict an artifact, those that were replaced too; with `name` of that one alone.

    Raises:
        UserError: there is no such store, or nothing of that name in it.
    """
    check_store(store)
    found = everything(store, only=name)
    if name is not None and not found:
        raise UserError(unknown_name(name, store))
    for one in found:
        unsealed = one.manifest is not None and one.manifest.checksum is None
        note = " (its manifest has no checksum)" if unsealed else ""
        yield Verdict(one.place, _settled_problem(one, store, shapes), note)


def left_over(store: Path) -> list[str]:
    """A line for each thing in the store that is no artifact, with what to do about it. None of it does harm."""
    return [
        printable(
            f"left     {left.place} ({as_bytes(size_of(left.folder))}): {left.what}"
            + (f"; rm -r '{left.folder}' frees it" if left.done else "")
        )
        for left in leftovers(store, everything(store))
    ]


def _settled_problem(found: Found, store: Path, shapes: Shapes) -> str:
    """What is wrong with an artifact that nobody wrote during the check: otherwise it is looked up and checked again.

    `verify` takes no lock, so an overwrite may replace the folder between two reads. A problem counts once the
    manifests it is about (the artifact's own and those of its sources) are the same before and after.
    """
    problem = ""
    for _ in range(READS):
        before = _stamps(store, found)
        if not (problem := _problem(found, store, shapes)):
            return ""
        if before == _stamps(store, found) and not is_locked(store / LOCKS / f"{found.place}.lock"):
            return problem
        time.sleep(0.02)
        again = everything(store, only=found.place)
        if not again:
            return "" if found.replaced else f"{found.folder}: was removed during the check"
        found = again[0]
    return problem


def _stamps(store: Path, found: Found) -> list[tuple[int, int] | None]:
    sources = found.manifest.sources if found.manifest is not None else []
    return [stamp(found.folder), *(stamp(store / source.name) for source in sources)]


def _problem(found: Found, store: Path, shapes: Shapes) -> str:
    if found.manifest is None:
        return found.problem
    try:
        artifact = read(found.folder)
        _check_contents(found.folder)
        sources = source_manifests(artifact.manifest, store)
        _check_tensors(artifact, shapes(artifact.manifest, sources, artifact.path))
    except (UserError, FileNotFoundError) as error:  # the folder may be replaced between two reads
        return str(error)
    return ""


def _check_contents(folder: Path) -> None:
    extra = sorted(entry.name for entry in folder.iterdir() if entry.name not in (MANIFEST, WEIGHTS, HEAD))
    if extra:
        raise UserError(f"{folder}: {', '.join(extra)} is no part of an artifact; move it elsewhere")


def _check_tensors(artifact: Artifact, shapes: Mapping[str, Mapping[str, tuple[int, ...]] | None]) -> None:
    for file, tensors in ((WEIGHTS, artifact.weights), (HEAD, artifact.head)):
        if (expected := shapes[file]) is not None:
            with _mendable():
                match_keys(expected, tensors, artifact.path / file)
        check_numbers(tensors, artifact.path / file)


@contextlib.contextmanager
def _mendable() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; {MEND}") from None

"""`verify`: read every file of a store and compare it with its manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion.errors import UserError
from fusion.locks import is_locked
from fusion.store.artifacts import check_numbers, match_keys, read
from fusion.store.layout import HEAD, MANIFEST, WEIGHTS
from fusion.store.leftovers import leftovers
from fusion.store.listing import as_bytes
from fusion.store.lookup import READS, Found, check_store, scan, source_manifests, stamp, unknown_name
from fusion.store.manifest import Manifest
from fusion.store.writing import artifact_lock
from fusion.text import printable


@dataclass(frozen=True)
class Verdict:
    """One line of `verify`.

    Attributes:
        problem: empty for a sound artifact.
        note: what could not be checked.
    """

    place: str
    problem: str = ""
    note: str = ""

    def __str__(self) -> str:
        text = f"problem  {self.place}: {self.problem}" if self.problem else f"ok       {self.place}{self.note}"
        return printable(text.replace("\n", " "))


Shapes = Callable[[Manifest, Sequence[Manifest], Path], Mapping[str, Mapping[str, tuple[int, ...]] | None]]
"""From a manifest, those of its sources and the artifact's folder to the tensors that each of its files must have.

None for a file that the manifest does not determine. It raises UserError for a manifest that describes no model.
"""


def verify(store: Path, shapes: Shapes, name: str | None = None) -> Iterator[Verdict]:
    """One verdict per artifact, replaced ones too; with `name`, of that one alone.

    Raises:
        UserError: the store or the artifact does not exist.
    """
    check_store(store)
    found = list(scan(store, only=name))
    if name is not None and not found:
        raise UserError(unknown_name(name, store))
    for one in found:
        no_checksum = one.manifest is not None and one.manifest.checksum is None
        note = " (its manifest has no checksum)" if no_checksum else ""
        yield Verdict(one.place, _settled_problem(one, store, shapes), note)


def left_over(store: Path) -> list[str]:
    """A line for each folder in the store that is not an artifact, with the command that removes it."""
    return [
        printable(
            f"left     {left.place} ({as_bytes(left.size)}): {left.what}"
            + (f"; rm -r '{left.folder}' frees it" if left.done else "")
        )
        for left in leftovers(store, list(scan(store)))
    ]


def _settled_problem(found: Found, store: Path, shapes: Shapes) -> str:
    """The problem of an artifact. If it or a source was overwritten during the check, it is checked again."""
    for _ in range(READS):
        before = _stamps(store, found)
        problem = _problem(found, store, shapes)
        overwritten = before != _stamps(store, found) or is_locked(artifact_lock(store, found.place))
        if not problem or not overwritten:
            return problem
        time.sleep(0.02)
        again = next(scan(store, only=found.place), None)
        if again is None:
            return "" if found.replaced else f"{found.folder}: was removed during the check"
        found = again
    return problem


def _stamps(store: Path, found: Found) -> list[tuple[int, int] | None]:
    sources = found.manifest.sources if found.manifest is not None else []
    return [stamp(found.folder), *(stamp(store / source.name) for source in sources)]


def _problem(found: Found, store: Path, shapes: Shapes) -> str:
    if found.manifest is None:
        return found.problem
    try:
        artifact = read(found.folder)
        files = {entry.name for entry in found.folder.iterdir()}
        if extra := sorted(files - {MANIFEST, WEIGHTS, HEAD}):
            return f"{found.folder}: {', '.join(extra)} is no part of an artifact; move it elsewhere"
        expected = shapes(artifact.manifest, source_manifests(artifact.manifest, store), artifact.path)
        for file, tensors in ((WEIGHTS, artifact.weights), (HEAD, artifact.head)):
            if (tensors_of := expected[file]) is not None:
                match_keys(tensors_of, tensors, artifact.path / file)
            check_numbers(tensors, artifact.path / file)
    except (UserError, FileNotFoundError) as error:  # the folder may be replaced between two reads
        return str(error)
    return ""

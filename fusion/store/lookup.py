"""Finding artifacts by name, path or hash, also while another process overwrites them: readers take no lock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fusion.errors import UserError
from fusion.store.layout import FIX, MANIFEST, OLD, REPLACED, STAGING, is_name, read_regular
from fusion.text import did_you_mean, listed, shortened

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

READS = 50  # attempts to read an artifact that is overwritten meanwhile


@dataclass(frozen=True)
class Found:
    """A folder that is or should be an artifact, with its manifest or what is wrong with it."""

    place: str  # below the store, `mnli` or `.replaced/mnli-0123abcd`
    folder: Path
    manifest: Manifest | None
    problem: str = ""

    @property
    def replaced(self) -> bool:
        return self.place.startswith(".")


def check_store(store: Path) -> None:
    """Refuse a store that does not exist."""
    if not store.is_dir():
        raise UserError(f"store={store}: there is no such folder; store=DIR names another, training creates one")


def names(store: Path) -> list[str]:
    """The artifacts of the store, sorted by name."""
    return sorted(folders(store))


def folders(store: Path) -> dict[str, Path]:
    """The folder of each artifact of the store, by name."""
    # An overwrite moves the old folder to STAGING, then the new one in: listed in this order, none is missed.
    current = entries(store)
    old = [folder.name.removesuffix(OLD) for folder in entries(store / STAGING) if folder.name.endswith(OLD)]
    found = {*old, *(folder.name for folder in [*current, *entries(store)] if not folder.name.startswith("."))}
    return {name: folder for name in found if (folder := _named(name, store)) is not None}


def _named(place: str, store: Path) -> Path | None:
    """The folder of an artifact. While it is overwritten, or if the writer was killed then, the old one in STAGING."""
    folder = store / place
    every = (folder, store / STAGING / f"{place}{OLD}", folder)
    return next((one for one in every if _is_artifact(one)), None)


def _is_artifact(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def entries(folder: Path) -> list[Path]:
    """The content of a folder, by name; empty if it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def find(reference: str, store: Path) -> Path:
    """The folder of an artifact: a name in the store first, then a path. UserError names similar ones."""
    if is_name(reference) and (folder := _named(reference, store)) is not None:
        return folder
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # text that cannot be a path
        path = Path(reference).expanduser()
        if reference and _is_artifact(path):
            return path
        if reference and path.exists():
            raise UserError(
                f"{path}: is not an artifact, it has no {MANIFEST}; expected a name of the store, or a folder"
            )
    raise UserError(unknown_name(reference, store))


def unknown_name(reference: str, store: Path) -> str:
    """The message about a name that the store does not have."""
    there = names(store)
    near = did_you_mean(reference, there) or "."
    has = f"It has {listed(there)}" if there else "It is empty or does not exist (store=DIR names another)"
    return (
        f"no artifact {shortened(reference)!r} in the store {store}{near} {has}; stage 1 makes an adapter: "
        "python -m fusion.stage1 +task=NAME"
    )


def read_manifest(reference: str, store: Path) -> Manifest:
    """The manifest of an artifact, by name or path; errors as `find_manifest`."""
    return find_manifest(reference, store)[1]


def find_manifest(reference: str, store: Path) -> tuple[Path, Manifest]:
    """The folder and the manifest of an artifact, by name or path; UserError if missing or damaged."""
    return read_settled(lambda: find(reference, store), lambda folder: (folder, read_folder(folder)))


Read = TypeVar("Read")


def read_settled(look: Callable[[], Path], read: Callable[[Path], Read]) -> Read:
    """`read(look())`, again if the folder was overwritten between the two."""
    for _ in range(READS - 1):
        folder = look()
        before = stamp(folder)
        try:
            return read(folder)
        except UserError:
            if before is not None and before == stamp(folder):
                raise
        time.sleep(0.01)
    return read(look())


def stamp(folder: Path) -> tuple[int, int] | None:
    """A value that changes when the artifact in a folder is overwritten; None if absent."""
    try:
        state = (folder / MANIFEST).stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns


def read_folder(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`."""
    from fusion.store.manifest import Manifest  # imports pydantic, which most commands do not need

    path = folder / MANIFEST
    try:
        text = read_regular(path).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text in UTF-8; {FIX}") from None
    return Manifest.from_json(text, path)


def scan(store: Path, only: str | None = None) -> Iterator[Found]:
    """All artifacts by name, then those that were replaced; damaged ones too. `only`: just that place."""
    places = {f.name for f in entries(store) if f.is_dir() and not f.name.startswith(".")} | {*folders(store)}
    for place in [*sorted(places), *(f"{REPLACED}/{f.name}" for f in entries(store / REPLACED))]:
        if only in (None, place):
            yield _read(place, store)


def _read(place: str, store: Path) -> Found:
    expected = store / place

    def current() -> Path:
        if (folder := _named(place, store)) is None:
            raise UserError(f"{expected / MANIFEST}: is missing, or no regular file; {FIX}")
        return folder

    try:
        folder, manifest = read_settled(current, lambda folder: (folder, read_folder(folder)))
    except UserError as error:
        return Found(place, expected, None, str(error))
    if not is_name(expected.name):
        return Found(place, expected, None, f"{expected}: is no name for the store; rename the folder")
    return Found(place, folder, manifest)


def artifacts(store: Path, replaced: bool = False) -> Iterator[tuple[Path, Manifest]]:
    """All artifacts of the store that can be read, by name; `replaced` adds those that were overwritten."""
    # STAGING first: an overwritten artifact moves from there to REPLACED.
    for folder in entries(store / STAGING) if replaced else ():
        if folder.name.endswith(OLD):
            with contextlib.suppress(UserError):
                yield folder, read_folder(folder)
    for found in scan(store):
        if found.manifest is not None and (replaced or not found.replaced):
            yield found.folder, found.manifest


def users_of(hash: str, found: Sequence[Found]) -> list[str]:
    """The fusions that have the artifact with this hash as a source."""
    return [f.place for f in found if f.manifest and hash in [source.hash for source in f.manifest.sources]]


def find_by_hash(hash: str, name: str, store: Path) -> Path:
    """The folder of the artifact with this hash: `name` first, then any, also replaced ones; UserError if none."""
    with contextlib.suppress(UserError):
        folder = find(name, store)
        if read_folder(folder).hash == hash:
            return folder
    for folder, manifest in artifacts(store, replaced=True):
        if manifest.hash == hash:
            return folder
    raise UserError(
        f"source {name} ({hash[:8]}) is gone: it was removed from the store {store}, damaged, or replaced by another "
        "artifact. Copy its folder back (any name will do), or train the fusion again with the sources there are"
    )


def source_manifests(manifest: Manifest, store: Path) -> list[Manifest]:
    """The manifests of a fusion's sources, in order; empty for anything else. Errors as `find_by_hash`."""
    return [read_folder(find_by_hash(source.hash, source.name, store)) for source in manifest.sources]

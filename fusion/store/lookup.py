"""Find artifacts by name, path or hash. Readers take no lock, so an artifact may be overwritten meanwhile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fusion.errors import UserError
from fusion.store.layout import FIX, MANIFEST, OLD, REPLACED, STAGING, check_regular, is_name, read_regular
from fusion.text import did_you_mean, listed, shortened

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

READS = 50  # attempts to read an artifact that is being overwritten


@dataclass(frozen=True)
class Found:
    """A directory that is or should be an artifact, with its manifest or the problem with it."""

    place: str  # relative to the store: `mnli` or `.replaced/mnli-0123abcd`
    folder: Path
    manifest: Manifest | None
    problem: str = ""

    @property
    def replaced(self) -> bool:
        return self.place.startswith(".")


def check_store(store: Path) -> None:
    if not store.is_dir():
        raise UserError(f"store={store}: directory not found; set store=DIR to a different directory")


def names(store: Path) -> list[str]:
    return sorted(folders(store))


def folders(store: Path) -> dict[str, Path]:
    """Map the name of each artifact in the store to its directory."""
    # An overwrite moves the old directory to STAGING, then the new one in; this order misses neither.
    current = entries(store)
    old = [folder.name.removesuffix(OLD) for folder in entries(store / STAGING) if folder.name.endswith(OLD)]
    found = {*old, *(folder.name for folder in [*current, *entries(store)] if not folder.name.startswith("."))}
    return {name: folder for name in found if (folder := _named(name, store)) is not None}


def _named(place: str, store: Path) -> Path | None:
    """Return the directory of an artifact, which is in STAGING if an overwrite is in progress or was interrupted."""
    folder = store / place
    every = (folder, store / STAGING / f"{place}{OLD}", folder)
    return next((one for one in every if (one / MANIFEST).is_file()), None)


def entries(folder: Path) -> list[Path]:
    """List a directory sorted by name. Returns an empty list if it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def find(reference: str, store: Path) -> Path:
    """Return the directory of an artifact, given its name in the store or its path. Raises UserError if missing."""
    if is_name(reference) and (folder := _named(reference, store)) is not None:
        return folder
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # not a valid path
        path = Path(reference).expanduser()
        if reference and (path / MANIFEST).is_file():
            return path
        if reference and path.exists():
            raise UserError(
                f"{path} is not an artifact, since it has no {MANIFEST}; expected a name or an artifact directory"
            )
    raise UserError(unknown_name(reference, store))


def unknown_name(reference: str, store: Path) -> str:
    there = names(store)
    near = did_you_mean(reference, there) or "."
    has = f"It contains {listed(there)}" if there else "It is empty or does not exist; set store=DIR to a different one"
    return f"no artifact {shortened(reference)!r} in the store {store}{near} {has}"


def read_manifest(reference: str, store: Path) -> Manifest:
    return find_manifest(reference, store)[1]


def find_manifest(reference: str, store: Path) -> tuple[Path, Manifest]:
    """Return the directory and manifest of an artifact, given its name or path. Raises UserError like `read_complete`."""
    return read_settled(lambda: find(reference, store), lambda folder: (folder, read_complete(folder)))


Read = TypeVar("Read")


def read_settled(look: Callable[[], Path], read: Callable[[Path], Read]) -> Read:
    """Return `read(look())`, retrying if the artifact was overwritten between the two calls."""
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
    """Identify the artifact in a directory, or return None if it is absent."""
    try:
        state = (folder / MANIFEST).stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns


def read_folder(folder: Path) -> Manifest:
    """Read the manifest of the artifact in `folder`. Raises UserError if it is missing or damaged."""
    from fusion.store.manifest import Manifest  # imports pydantic, which most commands do not need

    path = folder / MANIFEST
    return Manifest.from_json(read_regular(path), path)


def read_complete(folder: Path) -> Manifest:
    """Read a manifest. Raises UserError like `read_folder`, or if another file is missing or truncated."""
    manifest = read_folder(folder)
    for name, file in manifest.files.items():
        check_regular(folder / name, file.bytes)
    return manifest


def scan(store: Path, only: str | None = None) -> Iterator[Found]:
    """Yield all artifacts sorted by name, including damaged and replaced ones, or only the one at `only`."""
    places = {f.name for f in entries(store) if f.is_dir() and not f.name.startswith(".")} | {*folders(store)}
    for place in [*sorted(places), *(f"{REPLACED}/{f.name}" for f in entries(store / REPLACED))]:
        if only in (None, place):
            yield _read(place, store)


def _read(place: str, store: Path) -> Found:
    expected = store / place
    if not is_name(expected.name):
        return Found(place, expected, None, f"{expected} is not a valid artifact name; rename the directory")

    def current() -> Path:
        if (folder := _named(place, store)) is None:
            raise UserError(f"{expected / MANIFEST} is missing or not a regular file; {FIX}")
        return folder

    try:
        return read_settled(current, lambda folder: Found(place, folder, read_complete(folder)))
    except UserError as error:
        return Found(place, expected, None, str(error))


def artifacts(store: Path, replaced: bool = False) -> Iterator[tuple[Path, Manifest]]:
    """Yield all readable artifacts of the store, sorted by name; with `replaced`, also overwritten ones."""
    # STAGING first: an overwritten artifact moves from there to REPLACED.
    for folder in entries(store / STAGING) if replaced else ():
        if folder.name.endswith(OLD):
            with contextlib.suppress(UserError):
                yield folder, read_folder(folder)
    for found in scan(store):
        if found.manifest is not None and (replaced or not found.replaced):
            yield found.folder, found.manifest


def users_of(hash: str, found: Sequence[Found]) -> list[str]:
    """Return the fusions that have the artifact with this hash as a source."""
    return [f.place for f in found if f.manifest and hash in [source.hash for source in f.manifest.sources]]


def find_by_hash(hash: str, name: str, store: Path) -> Path:
    """Return the directory of the artifact with this hash, even if renamed or replaced. Raises UserError if missing."""
    with contextlib.suppress(UserError):
        folder = find(name, store)
        if read_folder(folder).hash == hash:
            return folder
    for folder, manifest in artifacts(store, replaced=True):
        if manifest.hash == hash:
            return folder
    raise UserError(
        f"source {name} ({hash[:8]}) not found: it was removed from the store {store}, damaged or replaced; copy it "
        "back under any name, or retrain the fusion"
    )


def source_manifests(manifest: Manifest, store: Path) -> list[Manifest]:
    """Return the manifests of a fusion's sources, in order. Raises UserError if one is missing."""
    return [read_folder(find_by_hash(source.hash, source.name, store)) for source in manifest.sources]

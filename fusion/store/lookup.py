"""Finding artifacts by name, by path or by hash, also while another process overwrites them: readers take no lock."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fusion.errors import UserError
from fusion.store.files import read_regular
from fusion.store.foreign import why_no_artifact
from fusion.store.layout import MANIFEST, OLD, REPLACED, STAGING
from fusion.store.names import is_name

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

READS = 50  # attempts to read an artifact that is overwritten meanwhile
MANIFEST_BYTES = 32 * 2**20  # more is no manifest
NAMES_SHOWN = 20


def names(store: Path) -> list[str]:
    """What the store has, sorted by name."""
    return sorted(folders(store))


def folders(store: Path) -> dict[str, Path]:
    """Where each artifact of the store lies."""
    if not store.is_dir():
        return {}
    # An overwrite takes the old folder to STAGING, the new one in, and the old one away: looked at in this
    # order, none is missed. What a killed writer left in STAGING is still the artifact of that name.
    standing = _standing(store)
    aside = {
        entry.name.removesuffix(OLD): entry
        for entry in (store / STAGING).glob(f"*{OLD}")
        if (entry / MANIFEST).is_file()
    }
    return aside | standing | _standing(store)


def _standing(store: Path) -> dict[str, Path]:
    entries = [entry for entry in store.iterdir() if not entry.name.startswith(".")]
    return {entry.name: entry for entry in entries if (entry / MANIFEST).is_file()}


def find(reference: str, store: Path) -> Path:
    """The folder of an artifact: a name in the store first, then a path.

    Raises:
        UserError: the nearest names, and what the store has.
    """
    if is_name(reference):
        if (store / reference / MANIFEST).is_file():
            return store / reference
        if (unsettled := _being_replaced(reference, store)) is not None:
            return unsettled
    path = Path(reference)
    try:
        path = path.expanduser()
        is_artifact, is_there = (path / MANIFEST).is_file(), path.exists()
    except (OSError, RuntimeError) as error:  # no permission, too long for a path, ~ of an unknown user
        raise UserError(f"{reference}: cannot be read as a folder ({error})") from None
    if reference and is_artifact:
        return path
    if reference and is_there:
        raise UserError(f"{reference}: {why_no_artifact(path)}")
    raise UserError(unknown_name(reference, store))


def _being_replaced(name: str, store: Path) -> Path | None:
    # An overwrite moves the old folder aside and the new one in: two renames, and a reader can come between.
    # If the writer died just there, the old artifact is whole, and is read from where it lies.
    old = store / STAGING / f"{name}{OLD}"
    for _ in range(20):
        if not (old / MANIFEST).is_file():
            break
        time.sleep(0.05)
        if (store / name / MANIFEST).is_file():
            return store / name
    if (store / name / MANIFEST).is_file():
        return store / name
    return old if (old / MANIFEST).is_file() else None


def unknown_name(reference: str, store: Path) -> str:
    """What to say of a name that the store does not have: near ones, and what there is."""
    there = names(store)
    near = difflib.get_close_matches(reference, there, n=3, cutoff=0.6)
    text = f"no artifact {reference!r} in the store {store}"
    text += f": did you mean {' or '.join(near)}? " if near else ". "
    if there:
        more = f" and {len(there) - NAMES_SHOWN} more" if len(there) > NAMES_SHOWN else ""
        text += f"It has {', '.join(there[:NAMES_SHOWN])}{more}"
    else:
        text += "It is empty" if store.is_dir() else "There is no such folder (store=DIR names another)"
    return text + "; stage 1 makes an adapter: python -m fusion.stage1 +task=NAME"


def read_manifest(reference: str, store: Path) -> Manifest:
    """The manifest of an artifact, by name or path.

    Raises:
        UserError: there is no such artifact, or its manifest is damaged.
    """
    return read_settled(lambda: find(reference, store), read_folder)


Read = TypeVar("Read")


def read_settled(look: Callable[[], Path], read: Callable[[Path], Read]) -> Read:
    """`read(look())`, again where the folder was overwritten between the two: readers take no lock."""
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
    try:
        state = (folder / MANIFEST).stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns


def read_folder(folder: Path) -> Manifest:
    """The manifest of the artifact that lies in `folder`."""
    from fusion.store.manifest import (
        Manifest,  # with pydantic, which a command that reads no artifact need not load
    )

    path = folder / MANIFEST
    try:
        text = read_regular(path, most=MANIFEST_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text in UTF-8; copy the artifact again, or train it again") from None
    return Manifest.from_json(text, path)


def find_by_hash(hash: str, name: str, store: Path) -> Path:
    """The folder of the artifact with this hash: `name` first, then any other of the store, also replaced ones.

    Raises:
        UserError: names the source, and says what stands in its place.
    """
    problem = f"nothing in the store {store} has that name or that hash"
    try:
        folder = find(name, store)
    except UserError:
        pass  # not there under its name; it may be under another
    else:
        try:
            found = read_folder(folder).hash
        except UserError as error:
            problem = str(error)
        else:
            if found == hash:
                return folder
            problem = (
                f"{folder} is another artifact now ({found[:8]}), and nothing else in the store has that hash"
            )
    for folder, manifest in artifacts(store, replaced=True):
        if manifest.hash == hash:
            return folder
    raise UserError(
        f"source {name} ({hash[:8]}) is gone: {problem}. "
        f"Copy its folder back into {store} (any name will do), or train the fusion again with the sources there are"
    )


def source_manifests(manifest: Manifest, store: Path) -> list[Manifest]:
    """Those of a fusion's sources, in order; empty for anything else.

    Raises:
        UserError: a source is missing or damaged.
    """
    return [read_folder(find_by_hash(source.hash, source.name, store)) for source in manifest.sources]


def artifacts(store: Path, replaced: bool = False) -> Iterator[tuple[Path, Manifest]]:
    """All artifacts of the store that can be read, by name; `replaced` adds those that were overwritten."""
    standing = names(store)
    more = [*(store / REPLACED).glob("*"), *(store / STAGING).glob(f"*{OLD}")] if replaced else []
    looks = [partial(find, name, store) for name in standing] + [
        partial(Path, folder) for folder in sorted(more)
    ]
    for look in looks:
        try:
            yield read_settled(look, lambda folder: (folder, read_folder(folder)))
        except UserError:
            continue  # one damaged artifact must not hide the others; it is reported when it is asked for

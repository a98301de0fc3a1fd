"""Change a store: locks, overwriting and removal of artifacts, and cleanup after killed writers.

For an artifact NAME, STORE/.staging contains `NAME~new` while it is written, `NAME.old` while it is replaced and
`NAME~removed` while it is deleted. Directories are renamed to their final name, so readers see complete artifacts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.errors import UserError
from fusion.files import unwritable
from fusion.locks import LOCKS, lock
from fusion.store.layout import HEAD, MANIFEST, NEW, OLD, REMOVED, REPLACED, STAGING, WEIGHTS, check_name
from fusion.store.lookup import artifacts, check_store, entries, folders, read_folder, scan, unknown_name, users_of

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

LOCK_SECONDS = 60.0


def artifact_lock(store: Path, name: str) -> Path:
    return store / LOCKS / f"{name}.lock"


@contextlib.contextmanager
def writing(store: Path, name: str, wait: float = LOCK_SECONDS) -> Iterator[None]:
    """Lock an artifact for writing. Raises UserError if another process holds the lock for `wait` seconds."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(artifact_lock(store, name), f"{store / name} is being written", wait))
        except TimeoutError as error:
            raise UserError(f"{error}; rerun the command when it is finished, or set a different name=") from None
        except OSError as error:
            raise unwritable("store", store / LOCKS, error) from None
        yield


def sync_folder(folder: Path) -> None:
    """Flush a rename in a directory to disk, if the system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def recover(store: Path, name: str) -> None:
    """Clean up after a killed writer of `name` and complete its replacement. The caller must hold the lock."""
    staging = store / STAGING
    staging.mkdir(exist_ok=True)
    for ending in (NEW, REMOVED):
        shutil.rmtree(staging / f"{name}{ending}", ignore_errors=True)
    old, final = staging / f"{name}{OLD}", store / name
    if not (old / MANIFEST).is_file():
        shutil.rmtree(old, ignore_errors=True)
    elif final.exists():
        archive(store, old, read_folder(final))
    else:
        os.replace(old, final)


def archive(store: Path, old: Path, new: Manifest) -> None:
    """Move a replaced artifact to STORE/.replaced if a fusion depends on it, otherwise delete it."""
    with contextlib.suppress(UserError):  # damaged
        manifest = read_folder(old)
        needed = {source.hash for _, fusion in artifacts(store) for source in fusion.sources}
        if manifest.hash in needed and manifest.hash != new.hash:
            keep_replaced(store, old, manifest)
    shutil.rmtree(old, ignore_errors=True)


def keep_replaced(store: Path, folder: Path, manifest: Manifest) -> Path:
    """Move an artifact to STORE/.replaced, where it is looked up by hash, unless a copy already exists."""
    kept = store / REPLACED / f"{manifest.name}-{manifest.hash[:8]}"
    with contextlib.suppress(UserError):
        if read_folder(kept).hash == manifest.hash:
            return kept
    shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(exist_ok=True)
    os.replace(folder, kept)
    sync_folder(kept.parent)
    return kept


def check_free(name: str, kind: str, store: Path, overwrite: bool) -> None:
    """Raise UserError if writing `name` would overwrite something that must be kept."""
    check_name(name)
    folder = folders(store).get(name, store / name)
    if not folder.exists():
        return
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} already exists and is not an artifact; set a different name= or move it")
    stored = kind
    with contextlib.suppress(UserError):  # a damaged artifact can be overwritten
        stored = read_folder(folder).kind
    if stored != kind:
        raise UserError(f"{store / name} is a stored {stored}; set a different name= for this {kind}")
    if not overwrite:
        raise UserError(f"{store / name} already exists; set overwrite=true to replace it or name=NAME to keep both")


def remove(name: str, store: Path, force: bool = False, wait: float = LOCK_SECONDS) -> str:
    """Remove an artifact, which may be damaged, and return the line to print.

    Raises UserError if fusions depend on it; with `force`, it is moved to STORE/.replaced instead.
    """
    check_name(name)  # never a path outside of the store
    check_store(store)
    folder, aside = store / name, store / STAGING / f"{name}{REMOVED}"
    if not os.path.lexists(folder) and name not in folders(store):  # writes nothing for a misspelled name
        raise UserError(unknown_name(name, store))
    with writing(store, name, wait):
        recover(store, name)
        content = {entry.name for entry in entries(folder)}
        if not folder.is_dir() or not (MANIFEST in content or content <= {WEIGHTS, HEAD}):
            raise UserError(f"{folder} is not an artifact, since it has no {MANIFEST}; delete it manually")
        found = list(scan(store))
        manifest = next((one.manifest for one in found if one.place == name), None)
        others = [one for one in found if one.place != name]
        if manifest and manifest.hash not in [one.manifest.hash for one in others if one.manifest]:
            current = [one for one in others if not one.replaced]
            users, need, first = users_of(manifest.hash, current), "is a source of", "remove"
            if not users and manifest.kind == "adapter":
                # The sources of an unreadable manifest are unknown.
                users = [f.place for f in current if f.manifest is None and (f.folder / MANIFEST).is_file()]
                need, first = "may be a source of the unreadable", "fix or remove"
            if users and not force:
                raise UserError(
                    f"{name} {need} {', '.join(users)}; {first} them first, or set force=true to move {name} to "
                    ".replaced, where fusions find it"
                )
            if users:
                kept = keep_replaced(store, folder, manifest)
                sync_folder(store)
                return f"removed {name}; {', '.join(users)} finds it in {kept}"
        os.replace(folder, aside)
        sync_folder(store)
        if aside.is_symlink():
            aside.unlink()
        else:
            shutil.rmtree(aside, ignore_errors=True)
    return f"removed {name}"

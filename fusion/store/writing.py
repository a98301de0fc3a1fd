"""Changing a store: one writer per name at a time, removal, and cleaning up after killed writers. No torch here.

STORE/.staging holds, of an artifact NAME, `NAME~new` while it is written, `NAME.old` while it is replaced and
`NAME~removed` while it is deleted. A folder gets its final name by a rename, so readers never see half an artifact.
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
    """The lock file of `writing`."""
    return store / LOCKS / f"{name}.lock"


@contextlib.contextmanager
def writing(store: Path, name: str, wait: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the lock for writing an artifact; UserError if another process has held it for `wait` seconds."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(artifact_lock(store, name), f"{store / name} is being written", wait))
        except TimeoutError as error:
            raise UserError(f"{error}. Run this again when that is done, or choose another name=") from None
        except OSError as error:
            raise unwritable("store", store / LOCKS, error) from None
        yield


def sync_folder(folder: Path) -> None:
    """Flush a rename in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def settle(store: Path, name: str) -> None:
    """Clean up what a killed writer of `name` left, and finish its replacement. Only for the holder of the lock."""
    staging = store / STAGING
    staging.mkdir(exist_ok=True)
    for ending in (NEW, REMOVED):
        shutil.rmtree(staging / f"{name}{ending}", ignore_errors=True)
    old, final = staging / f"{name}{OLD}", store / name
    if not (old / MANIFEST).is_file():
        shutil.rmtree(old, ignore_errors=True)
    elif final.exists():
        retire(store, old, read_folder(final))
    else:
        os.replace(old, final)


def retire(store: Path, old: Path, new: Manifest) -> None:
    """Keep a replaced artifact if a fusion of the store needs it, and remove it otherwise."""
    with contextlib.suppress(UserError):  # a damaged one has no use
        manifest = read_folder(old)
        needed = {source.hash for _, fusion in artifacts(store) for source in fusion.sources}
        if manifest.hash in needed and manifest.hash != new.hash:
            keep_replaced(store, old, manifest)
    shutil.rmtree(old, ignore_errors=True)


def keep_replaced(store: Path, folder: Path, manifest: Manifest) -> Path:
    """Move an artifact to STORE/.replaced, where fusions find it by its hash, unless it is there already."""
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
    """Refuse to write `name` over what is no artifact, one of another kind, or, without `overwrite`, any artifact."""
    check_name(name)
    folder = folders(store).get(name, store / name)
    if not folder.exists():
        return
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} exists and is not an artifact: choose another name=, or move it away")
    stored = kind
    with contextlib.suppress(UserError):  # a damaged one is fixed by training it again with overwrite=true
        stored = read_folder(folder).kind
    if stored != kind:
        raise UserError(f"{store / name} is a stored {stored}: choose another name= for this {kind}")
    if not overwrite:
        raise UserError(f"{store / name} exists: overwrite=true replaces it, name=NAME keeps both")


def remove(name: str, store: Path, force: bool = False, wait: float = LOCK_SECONDS) -> str:
    """Remove an artifact from the store, also a damaged one, and return the line to print.

    With `force`, an artifact that fusions need or may need moves to STORE/.replaced, as by an overwrite. UserError: it
    does not exist, fusions need it or may need it, or it is being written.
    """
    check_name(name)  # never a path: nothing outside of a store is deleted
    check_store(store)
    folder, aside = store / name, store / STAGING / f"{name}{REMOVED}"
    with writing(store, name, wait):
        settle(store, name)
        if not os.path.lexists(folder):
            raise UserError(unknown_name(name, store))
        content = {entry.name for entry in entries(folder)}
        if not folder.is_dir() or not (MANIFEST in content or content <= {WEIGHTS, HEAD}):
            raise UserError(
                f"{folder} is not an artifact, it has no {MANIFEST}: remove it manually if it is not needed"
            )
        found = list(scan(store))
        manifest = next((one.manifest for one in found if one.place == name), None)
        others = [one for one in found if one.place != name]
        if manifest is not None and manifest.hash not in [one.manifest.hash for one in others if one.manifest]:
            current = [one for one in others if not one.replaced]
            users, need = users_of(manifest.hash, current), "is a source of"
            if not users and manifest.kind == "adapter":
                # The sources of a manifest that cannot be read are not known.
                users = [f.place for f in current if f.manifest is None and (f.folder / MANIFEST).is_file()]
                need = "may be a source of the unreadable"
            if users and not force:
                raise UserError(
                    f"{name} {need} {', '.join(users)}: remove or fix them first\n"
                    "force=true frees the name and keeps the files in .replaced, where fusions find them"
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

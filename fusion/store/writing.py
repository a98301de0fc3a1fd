"""Changing a store: one writer per name at a time, and cleaning up after a writer that was killed. No torch here.

STORE/.staging holds, of an artifact NAME, `NAME~new` while it is written, `NAME.old` while it is replaced and
`NAME~removed` while it is deleted. A folder gets its final name by a rename, so readers never see half an artifact.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.errors import UserError
from fusion.files import resolve_path
from fusion.locks import LOCKS, lock
from fusion.store.layout import MANIFEST, NEW, OLD, REMOVED, REPLACED, STAGING, check_name
from fusion.store.lookup import artifacts, folders, read_folder

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

LOCK_SECONDS = 60.0


def artifact_lock(store: Path, name: str) -> Path:
    """The lock file of `writing`."""
    return store / LOCKS / f"{name}.lock"


@contextlib.contextmanager
def writing(store: Path, name: str, wait: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the lock for writing an artifact.

    Raises:
        UserError: another process has held it for `wait` seconds, or there can be no lock.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(artifact_lock(store, name), f"{store / name} is being written", wait))
        except TimeoutError as error:
            raise UserError(f"{error}. Run this again when that is done, or choose another name=") from None
        except OSError as error:
            raise UserError(
                f"{store / LOCKS}: cannot be written ({error.strerror or error}), and nothing is stored without a lock; "
                "store=DIR names another store"
            ) from None
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
    """Refuse to write `name` where that would replace something that must stay.

    Raises:
        UserError: the name is taken by something that is not an artifact, by an artifact of another kind (a fusion never
            replaces an adapter), or by an artifact without `overwrite`.
    """
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


def check_writable(store: Path) -> None:
    """Refuse a store that cannot be written, before hours are spent on training.

    Raises:
        UserError: the store is a file, or it or the folder to create it in is not writable.
    """
    resolve_path(str(store), "store")
    if store.exists() and not store.is_dir():
        raise UserError(f"store={store}: is a file, expected a folder")
    nearest = next(folder for folder in (store.absolute(), *store.absolute().parents) if folder.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=nearest))  # permissions do not show a read-only disk
    except OSError as error:
        raise UserError(
            f"store={store}: {nearest} cannot be written ({error.strerror}); store=DIR names another folder"
        ) from None

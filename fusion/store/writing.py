"""Changing a store: one writer of a name at a time, and what a writer that was killed left is put in order.

No torch here. STORE/.staging holds, for an artifact NAME, `NAME~new` while it is written, `NAME.old` while it is
replaced, `NAME~removed` while it is deleted; no name has a tilde, so that none is taken for another's.
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
from fusion.store.layout import MANIFEST, OLD, REPLACED, STAGING
from fusion.store.lookup import artifacts, folders, read_folder
from fusion.store.names import check_name

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

LOCK_SECONDS = 60.0
NEW = "~new"
REMOVED = "~removed"


@contextlib.contextmanager
def writing(store: Path, name: str, wait: float = LOCK_SECONDS) -> Iterator[None]:
    """Holds the name against other writers. Beside the lock a note says who holds it.

    The system takes the lock back from a process that dies, however it dies.

    Raises:
        UserError: another process has held it for `wait` seconds, or the lock cannot be made.
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


def artifact_lock(store: Path, name: str) -> Path:
    return store / LOCKS / f"{name}.lock"


def sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some systems cannot sync a folder; the rename is atomic all the same
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def settle(store: Path, name: str) -> None:
    """Ends what a killed writer left half-way. Called under the lock, so nobody is at work there."""
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
    """Keeps a replaced artifact where a fusion of the store still needs it, and removes it otherwise."""
    try:
        manifest = read_folder(old)
    except UserError:
        shutil.rmtree(old, ignore_errors=True)
        return
    if manifest.hash in needed_hashes(store) and manifest.hash != new.hash:
        keep_replaced(store, old, manifest)
    shutil.rmtree(old, ignore_errors=True)


def needed_hashes(store: Path) -> set[str]:
    """Of all sources that the fusions of the store name."""
    return {source.hash for _, fusion in artifacts(store) for source in fusion.sources}


def keep_replaced(store: Path, folder: Path, manifest: Manifest) -> Path:
    """Moves an artifact to STORE/.replaced, where fusions still find it by its hash; unless it is there already."""
    kept = store / REPLACED / f"{manifest.name}-{manifest.hash[:8]}"
    with contextlib.suppress(UserError):
        if read_folder(kept).hash == manifest.hash:
            return kept
    shutil.rmtree(kept, ignore_errors=True)  # what lies there is no artifact
    kept.parent.mkdir(exist_ok=True)
    os.replace(folder, kept)
    sync_folder(kept.parent)
    return kept


def check_free(name: str, kind: str, store: Path, overwrite: bool) -> None:
    """Refuses to write `name` where something stands that must not be replaced.

    Raises:
        UserError: the name is taken: by something else than an artifact, by another kind (a fusion never takes
            an adapter's name, even with overwrite), or by an artifact without `overwrite`.
    """
    check_name(name)
    folder = store / name
    if not folder.exists():
        folder = folders(store).get(name, folder)
    if not folder.exists():
        return
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is there and is no artifact: choose another name=, or move it away")
    stored = kind
    with contextlib.suppress(UserError):  # damaged: training it again with overwrite=true is the mend
        stored = read_folder(folder).kind
    if stored != kind:
        raise UserError(f"{store / name} is kept for a stored {stored}: choose another name= for this {kind}")
    if not overwrite:
        raise UserError(f"{store / name} is there already: overwrite=true replaces it, name=NAME keeps both")


def check_writable(store: Path) -> None:
    """Refuses a store that cannot be written, before hours are spent on what should go there.

    Raises:
        UserError: the store is a file, or it or the folder it would be made in is not writable.
    """
    resolve_path(str(store), "store")
    if store.exists() and not store.is_dir():
        raise UserError(f"store={store}: this is a file, expected a folder")
    nearest = store.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    try:
        os.rmdir(tempfile.mkdtemp(dir=nearest))  # tried, since permissions do not tell of read-only disks
    except OSError as error:
        raise UserError(
            f"store={store}: {nearest} cannot be written ({error.strerror}); store=DIR names another folder"
        ) from None

"""`remove`: an artifact goes away whole, and not from under a fusion that needs it."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from fusion.errors import UserError
from fusion.store.layout import HEAD, MANIFEST, STAGING, WEIGHTS
from fusion.store.lookup import artifacts, names, read_folder, unknown_name
from fusion.store.names import check_name
from fusion.store.overview import check_store
from fusion.store.writing import (
    LOCK_SECONDS,
    REMOVED,
    keep_replaced,
    settle,
    sync_folder,
    writing,
)


def remove(name: str, store: Path, force: bool = False, wait: float = LOCK_SECONDS) -> str:
    """Takes an artifact out of the store, and gives the line that says what became of it.

    With `force` an artifact that fusions need, or may need, goes to STORE/.replaced, as by an overwrite: they go on working,
    and the name is free. A damaged artifact can be removed; no fusion can be using it.

    Raises:
        UserError: the name is none, nothing stands there, fusions need it or may need it, or it is being written.
    """
    check_name(name)  # never a path: what lies outside of a store is not ours to delete
    check_store(store)
    folder = store / name
    if not os.path.lexists(folder) and name not in names(store):
        raise UserError(unknown_name(name, store))
    with writing(store, name, wait):
        settle(store, name)
        if not os.path.lexists(folder):
            raise UserError(unknown_name(name, store))
        _check_ours(folder)
        manifest, users = None, []
        with contextlib.suppress(UserError):
            manifest = read_folder(folder)
        if manifest is not None:
            users = _only_users(name, manifest.hash, store)
        # A manifest that cannot be read does not tell its sources.
        unreadable = _unreadable(store) if manifest is not None and manifest.kind == "adapter" else []
        if unreadable and not users and not force:
            raise UserError(
                f"{name} may be a source of {', '.join(unreadable)}, which cannot be read: mend or remove "
                f"{'that' if len(unreadable) == 1 else 'those'} first (python -m fusion.store verify)\n"
                "or say force=true, which frees the name and keeps the files in .replaced, where fusions find them"
            )
        users = users or unreadable
        if users and not force:
            raise UserError(
                f"{name} is a source of {', '.join(users)}: remove {'that' if len(users) == 1 else 'those'} first\n"
                "or say force=true, which frees the name and keeps the files in .replaced, where fusions find them"
            )
        if users and manifest is not None:
            kept = keep_replaced(store, folder, manifest)
            sync_folder(store)
            return f"removed {name}; {', '.join(users)} finds it in {kept}"
        aside = store / STAGING / f"{name}{REMOVED}"
        os.replace(folder, aside)  # gone at once; what follows may be interrupted
        sync_folder(store)
        if aside.is_symlink():
            aside.unlink()
        else:
            shutil.rmtree(aside, ignore_errors=True)
    return f"removed {name}"


def _check_ours(folder: Path) -> None:
    """Refuses what is neither an artifact nor the remains of one.

    Raises:
        UserError: a file, or a folder of other things.
    """
    if folder.is_dir():
        there = {entry.name for entry in folder.iterdir()}
        if MANIFEST in there or there <= {WEIGHTS, HEAD}:
            return
    elif folder.is_symlink() and not folder.exists():
        return
    raise UserError(f"{folder} is no artifact, it has no {MANIFEST}: remove it by hand if nobody needs it")


def _unreadable(store: Path) -> list[str]:
    """The artifacts whose manifest cannot be read."""
    found = []
    for name in names(store):
        try:
            read_folder(store / name)
        except UserError:
            found.append(name)
    return found


def _only_users(name: str, hash: str, store: Path) -> list[str]:
    """The fusions that find this artifact nowhere else in the store."""
    others = (manifest.hash for folder, manifest in artifacts(store, replaced=True) if folder != store / name)
    if hash in others:
        return []
    return [
        folder.name
        for folder, manifest in artifacts(store)
        if any(source.hash == hash for source in manifest.sources)
    ]

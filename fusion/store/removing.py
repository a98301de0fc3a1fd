"""`remove`: an artifact goes away whole, and not from under a fusion that needs it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fusion.errors import UserError
from fusion.store.layout import HEAD, MANIFEST, STAGING, WEIGHTS
from fusion.store.lookup import names, unknown_name
from fusion.store.names import check_name
from fusion.store.overview import Found, check_store, everything, users_of
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

    With `force` an artifact that fusions need, or may need, goes to STORE/.replaced, as by an overwrite: they
    still work, and the name is free. A damaged artifact can be removed; no fusion can be using it.

    Raises:
        UserError: the name is none, nothing is there, fusions need it or may need it, or it is being written.
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
        found = everything(store)
        manifest = next((one.manifest for one in found if one.place == name), None)
        users, unreadable = [], []
        if manifest is not None and not _is_elsewhere(name, manifest.hash, found):
            users = users_of(manifest.hash, [one for one in found if not one.replaced])
            # A manifest that cannot be read does not tell its sources, which are adapters.
            unreadable = _unreadable(found) if manifest.kind == "adapter" else []
        if (users or unreadable) and not force:
            what = (
                f"{name} is a source of {', '.join(users)}: remove {'that' if len(users) == 1 else 'those'} first"
                if users
                else f"{name} may be a source of {', '.join(unreadable)}, which cannot be read: fix or remove "
                f"{'that' if len(unreadable) == 1 else 'those'} first (python -m fusion.store verify)"
            )
            raise UserError(
                f"{what}\nor say force=true, which frees the name and keeps the files in .replaced, where fusions find them"
            )
        users = users or unreadable
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


def _is_elsewhere(name: str, hash: str, found: list[Found]) -> bool:
    """Whether fusions find this very artifact under another name, or among those that were replaced."""
    return any(one.manifest.hash == hash for one in found if one.manifest is not None and one.place != name)


def _unreadable(found: list[Found]) -> list[str]:
    """The artifacts whose manifest is there and cannot be read."""
    return [
        one.place
        for one in found
        if one.manifest is None and not one.replaced and (one.folder / MANIFEST).is_file()
    ]

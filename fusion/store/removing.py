"""`remove`: delete an artifact, unless a fusion needs it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fusion.errors import UserError
from fusion.store.layout import HEAD, MANIFEST, REMOVED, STAGING, WEIGHTS, check_name
from fusion.store.lookup import check_store, entries, names, scan, unknown_name, users_of
from fusion.store.writing import LOCK_SECONDS, keep_replaced, settle, sync_folder, writing


def remove(name: str, store: Path, force: bool = False, wait: float = LOCK_SECONDS) -> str:
    """Remove an artifact from the store and return the line to print.

    With `force`, an artifact that fusions need or may need moves to STORE/.replaced, as by an overwrite: they still
    work, and the name is free. A damaged artifact can be removed; no fusion can be using it.

    Raises:
        UserError: the artifact does not exist, fusions need it or may need it, or it is being written.
    """
    check_name(name)  # never a path: nothing outside of a store is deleted
    check_store(store)
    folder = store / name
    if not os.path.lexists(folder) and name not in names(store):
        raise UserError(unknown_name(name, store))
    with writing(store, name, wait):
        settle(store, name)
        if not os.path.lexists(folder):
            raise UserError(unknown_name(name, store))
        content = {entry.name for entry in entries(folder)}
        dangling = folder.is_symlink() and not folder.exists()
        if not dangling and (not folder.is_dir() or not (MANIFEST in content or content <= {WEIGHTS, HEAD})):
            raise UserError(
                f"{folder} is not an artifact, it has no {MANIFEST}: remove it manually if it is not needed"
            )
        found = list(scan(store))
        manifest = next((one.manifest for one in found if one.place == name), None)
        others = [one for one in found if one.place != name]
        copies = [one for one in others if one.manifest and manifest and one.manifest.hash == manifest.hash]
        if manifest is not None and not copies:
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
        aside = store / STAGING / f"{name}{REMOVED}"
        os.replace(folder, aside)
        sync_folder(store)
        if aside.is_symlink():
            aside.unlink()
        else:
            shutil.rmtree(aside, ignore_errors=True)
    return f"removed {name}"

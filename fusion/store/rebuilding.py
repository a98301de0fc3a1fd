"""The commands that make an artifact again, those of its sources first.

Each is one line for a shell. Store, name, seed and what came from the environment are explicit, so that another
shell runs the same.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from fusion.store.lookup import find, find_by_hash, read_folder
from fusion.text import key_of, override

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

# Overrides that are replaced: sources=top:3 by the names that it selected, without further settings of the selection.
REPLACED = ("store", "name", "seed", "overwrite", "resume", "sources_by")


def rebuild_lines(manifest: Manifest, store: Path, into: Path) -> list[str]:
    """Shell lines, in order: a command for each artifact, comments for what is missing.

    Args:
        store: where its sources are looked up.
        into: the store that the commands write to.
    """
    lines: list[str] = []
    folder = None
    for needed in _in_order(manifest, store, set()):
        if isinstance(needed, str):
            lines.append(f"# {needed}")
            continue
        if needed.run.folder not in (None, folder):
            folder = needed.run.folder
            lines.append(f"cd {shlex.quote(str(folder))}")
        lines.append(_command(needed, into))
    return lines


def _in_order(manifest: Manifest, store: Path, seen: set[str]) -> Iterator[Manifest | str]:
    """What an artifact is made from, then itself, each once. Text: what is missing."""
    if manifest.hash in seen:
        return
    seen.add(manifest.hash)
    origin = manifest.run.init_from
    parts = [(source.hash, source.name) for source in (*manifest.sources, *([origin] if origin else []))]
    if manifest.composition is not None and (pruned := manifest.composition.settings.fusion) is not None:
        parts.append(("", pruned))
    for hash, name in parts:
        try:
            folder = find_by_hash(hash, name, store) if hash else find(name, store)
            yield from _in_order(read_folder(folder), store, seen)
        except UserError as error:
            yield " ".join(str(error).split())
    yield manifest


def _command(manifest: Manifest, into: Path) -> str:
    run = manifest.run
    if not run.overrides:
        return f"# {manifest.name} was not made by a command"
    words = [word for word in run.overrides if key_of(word) not in REPLACED]
    data = run.config.get("data.dir")
    if isinstance(data, str) and "data.dir" not in map(key_of, words):  # it came from FUSION_DATA_DIR
        words.append(override("data.dir", data))
    # By name: a source that was given by its path has its name in the store that is written to.
    names: dict[str, Any] = {"sources": [source.name for source in manifest.sources]}
    if run.init_from is not None:
        names["init_from"] = run.init_from.name
    words = [override(key, names[key]) if (key := key_of(word)) in names else word for word in words]
    own = {"name": manifest.name, "store": str(into.absolute()), "seed": manifest.seed}
    words += [override(key, value) for key, value in own.items()]
    variables = [f"{key}={shlex.quote(value)}" for key, value in run.environment.items()]
    stage = "stage2" if manifest.kind == "fusion" else "stage1"
    return " ".join([*variables, "python", "-m", f"fusion.{stage}", *map(shlex.quote, words)])

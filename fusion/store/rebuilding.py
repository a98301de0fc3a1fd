"""The commands that make an artifact anew: its own, and before it those of the sources that it needs.

Each is one line for a shell. Store, name and seed are said outright, and what came from the environment too, so
that another shell, on another day, runs the same thing.
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

# Of sources=top:3, the names that it stood for are said, and so nothing else about them.
SAID_ANYWAY = ("store", "name", "seed", "overwrite", "resume", "sources_by")


def rebuild_lines(manifest: Manifest, store: Path, into: Path) -> list[str]:
    """Shell lines, in order: comments where something has to be known, and a command for each artifact.

    Args:
        store: where its sources are looked for.
        into: the store that the commands write to.
    """
    lines: list[str] = []
    standing = None
    for needed in _in_order(manifest, store, []):
        if isinstance(needed, str):
            lines.append(f"# {needed}")
            continue
        where = needed.run.folder
        if isinstance(where, str) and where != standing:
            lines.append(f"cd {shlex.quote(where)}")
            standing = where
        lines += _command(needed, into)
    return lines


def _in_order(manifest: Manifest, store: Path, seen: list[str]) -> Iterator[Manifest | str]:
    """What an artifact is made of, then itself; each once. Text: what is missing."""
    if manifest.hash in seen:
        return
    seen.append(manifest.hash)
    for source in manifest.sources:
        try:
            found = read_folder(find_by_hash(source.hash, source.name, store))
        except UserError as error:
            yield " ".join(str(error).split())
        else:
            yield from _in_order(found, store, seen)
    if (origin := manifest.run.init_from) is not None:
        try:
            yield from _in_order(read_folder(find_by_hash(origin.hash, origin.name, store)), store, seen)
        except UserError:
            yield f"init_from={origin.name} ({origin.hash[:8]}), whose weights {manifest.name} was trained from, is gone"
    pruned = None if manifest.composition is None else manifest.composition.settings.fusion
    if isinstance(pruned, str):
        try:
            yield from _in_order(read_folder(find(pruned, store)), store, seen)
        except UserError:
            yield f"composition.fusion={pruned}, which {manifest.name} was pruned from, is gone"
    yield manifest


def _command(manifest: Manifest, into: Path) -> list[str]:
    overrides = [word for word in manifest.run.overrides if isinstance(word, str)]
    if not overrides:
        return [f"# {manifest.name} was not made by a command: there is nothing to type again"]
    stage = "stage2" if manifest.kind == "fusion" else "stage1"
    kept = [word for word in overrides if key_of(word) not in SAID_ANYWAY]
    said = {key_of(word) for word in kept}
    config: dict[str, Any] = manifest.run.config
    data = config.get("data.dir")
    if isinstance(data, str) and "data.dir" not in said:  # it came from FUSION_DATA_DIR
        kept.append(override("data.dir", data))
    # By name: a source that was given by a path has its name in the store that is written to.
    names = override("sources", [source.name for source in manifest.sources])
    kept = [names if key_of(word) == "sources" else word for word in kept]
    if manifest.run.init_from is not None:
        initial = override("init_from", manifest.run.init_from.name)
        kept = [initial if key_of(word) == "init_from" else word for word in kept]
    kept += [
        override("name", manifest.name),
        override("store", str(into.absolute())),
        f"seed={manifest.seed}",
    ]
    environment = manifest.run.environment
    variables = environment.items() if isinstance(environment, dict) else ()
    words = [f"{key}={shlex.quote(str(value))}" for key, value in variables]
    words += ["python", "-m", f"fusion.{stage}", *map(shlex.quote, kept)]
    return [" ".join(words)]

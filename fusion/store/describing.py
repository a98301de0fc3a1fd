"""`show`: all that a manifest says, for people, and the commands that make the artifact anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from fusion.store.layout import MANIFEST
from fusion.store.listing import as_bytes, number, what_it_is, when
from fusion.store.lookup import find, find_by_hash, read_folder, read_settled
from fusion.store.overview import everything, users_of
from fusion.store.rebuilding import rebuild_lines
from fusion.text import printable

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest
    from fusion.store.parts import Git, Source


def describe(reference: str, store: Path, into: Path | None = None) -> list[str]:
    """The lines of `show`.

    Args:
        reference: a name of the store, or a path.
        into: the store that the commands shall write to; None: the same.

    Raises:
        UserError: there is no such artifact, or its manifest is damaged.
    """
    folder, manifest = read_settled(
        lambda: find(reference, store), lambda folder: (folder, read_folder(folder))
    )
    lines = [printable(line) for line in _facts(folder, manifest, store)]
    lines += ["", "to make it anew:"]
    return lines + [printable(line) for line in rebuild_lines(manifest, folder.parent, into or folder.parent)]


def _facts(folder: Path, manifest: Manifest, store: Path) -> Iterator[str]:
    backbone, run = manifest.backbone, manifest.run
    users = users_of(manifest.hash, everything(store))
    yield from _lines(
        {
            "name": manifest.name,
            "kind": f"{manifest.kind} ({what_it_is(manifest)})",
            "folder": folder,
            "stored": when(folder / MANIFEST),
            "hash": manifest.hash,
            "used by": ", ".join(users) or "nothing",
        }
    )
    for task in manifest.tasks:
        labels = ", ".join(map(str, task.labels or [])) or "none"
        yield f"{'task':<14}{task.name} ({task.kind}), labels: {labels}"
    revision = f", revision {backbone.revision}" if backbone.revision else ""
    own_code = ", with code of its own" if backbone.trust_remote_code else ""
    yield from _lines(
        {
            "backbone": f"{backbone.name_or_path} ({backbone.family}, {backbone.layers} layers, hidden size "
            f"{backbone.hidden_size}{revision}{own_code})",
            "fingerprint": backbone.fingerprint,
            "tokenizer": backbone.tokenizer or "not known",
            "head": _settings(manifest.content["head"]),
        }
    )
    for title in ("adapter", "composition", "method"):
        if (settings := manifest.content.get(title)) is not None:
            yield f"{title:<14}{_settings(settings)}"
    for source in manifest.sources:
        yield f"{'source':<14}{source.name} {source.hash}, {_where(source, folder.parent)}"
    if (origin := run.init_from) is not None:
        yield f"{'init_from':<14}{origin.name} {origin.hash}, {_where(origin, folder.parent)}"
    for split, metrics in manifest.metrics.items():
        yield f"{'score':<14}{split}: {_settings(metrics)}"
    result = manifest.result
    if diverged := result.diverged:
        yield f"{'diverged':<14}{_settings(diverged)}"
    yield from _lines(
        {
            "epochs": f"best {result.best_epoch} of {result.epochs}",
            "parameters": _settings(result.parameters),
            "seed": manifest.seed,
            "max_length": manifest.data.max_length,
        }
    )
    for split, fingerprint in manifest.data.fingerprints.items():
        yield f"{'data':<14}{split} {fingerprint}"
    yield from _lines(
        {
            "versions": _settings(manifest.versions),
            "git": "not known" if run.git is None else _git(run.git),
            "threads": "not known" if run.threads is None else run.threads,
            "run": f"{run.identity}, its folder {run.directory}",
            "started in": run.folder or "not known",
        }
    )
    for file, entry in manifest.files.items():
        yield f"{'file':<14}{file}, {entry.bytes:,} bytes ({as_bytes(entry.bytes)}), sha256 {entry.sha256}"


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    return (f"{title:<14}{value}" for title, value in facts.items())


def _settings(values: Any) -> str:
    if not isinstance(values, dict):
        return "not known" if values is None else number(values)
    return ", ".join(f"{key} {number(value)}" for key, value in values.items()) or "none"


def _git(state: Git) -> str:
    changed = {True: ", with changes that are not committed", None: ", changes not known"}
    return f"{state.commit}{changed.get(state.dirty, '')}"


def _where(source: Source, store: Path) -> str:
    try:
        return f"found: {find_by_hash(source.hash, source.name, store)}"
    except UserError:
        return "NOT FOUND"

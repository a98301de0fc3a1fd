"""`show`: all facts of a manifest, and the commands that make the artifact again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from fusion.store.layout import MANIFEST
from fusion.store.listing import as_bytes, number, what_it_is, when
from fusion.store.lookup import find, find_by_hash, read_folder, read_settled, scan, users_of
from fusion.store.rebuilding import rebuild_lines
from fusion.text import printable

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest
    from fusion.store.parts import Source


def describe(reference: str, store: Path, into: Path | None = None) -> list[str]:
    """The lines of `show`.

    Args:
        reference: a name of the store, or a path.
        into: the store that the commands write to; None: the same.

    Raises:
        UserError: the artifact does not exist, or its manifest is damaged.
    """
    folder, manifest = read_settled(lambda: find(reference, store), lambda folder: (folder, read_folder(folder)))
    lines = [f"{title:<14}{value}" for title, value in _facts(folder, manifest, store)]
    lines += ["", "to make it again:", *rebuild_lines(manifest, folder.parent, into or folder.parent)]
    return [printable(line) for line in lines]


def _facts(folder: Path, manifest: Manifest, store: Path) -> Iterator[tuple[str, Any]]:
    backbone, run, result = manifest.backbone, manifest.run, manifest.result
    yield "name", manifest.name
    yield "kind", f"{manifest.kind} ({what_it_is(manifest)})"
    yield "folder", folder
    yield "stored", when(folder / MANIFEST)
    yield "hash", manifest.hash
    yield "used by", ", ".join(users_of(manifest.hash, list(scan(store)))) or "nothing"
    for task in manifest.tasks:
        yield "task", f"{task.name} ({task.kind}), labels: {', '.join(map(str, task.labels or [])) or 'none'}"
    revision = f", revision {backbone.revision}" if backbone.revision else ""
    custom_code = ", with custom code" if backbone.trust_remote_code else ""
    yield (
        "backbone",
        f"{backbone.name_or_path} ({backbone.family}, {backbone.layers} layers, hidden size "
        f"{backbone.hidden_size}{revision}{custom_code})",
    )
    yield "fingerprint", backbone.fingerprint
    yield "tokenizer", backbone.tokenizer or "not known"
    for part in ("head", "adapter", "composition", "method"):
        if (settings := manifest.content.get(part)) is not None:
            yield part, _settings(settings)
    for source in manifest.sources:
        yield "source", f"{source.name} {source.hash}, {_where(source, folder.parent)}"
    if (origin := run.init_from) is not None:
        yield "init_from", f"{origin.name} {origin.hash}, {_where(origin, folder.parent)}"
    for split, metrics in manifest.metrics.items():
        yield "score", f"{split}: {_settings(metrics)}"
    if result.diverged:
        yield "diverged", _settings(result.diverged)
    yield "epochs", f"best {result.best_epoch} of {result.epochs}"
    yield "parameters", _settings(result.parameters)
    yield "seed", manifest.seed
    yield "max_length", manifest.data.max_length
    for split, fingerprint in manifest.data.fingerprints.items():
        yield "data", f"{split} {fingerprint}"
    yield "versions", _settings(manifest.versions)
    changed = {True: ", with uncommitted changes", None: ", changes not known", False: ""}
    yield "git", f"{run.git.commit}{changed[run.git.dirty]}" if run.git else "not known"
    yield "threads", "not known" if run.threads is None else run.threads
    yield "run", f"{run.identity}, its folder {run.directory}"
    yield "started in", run.folder or "not known"
    for file, entry in manifest.files.items():
        yield "file", f"{file}, {entry.bytes:,} bytes ({as_bytes(entry.bytes)}), sha256 {entry.sha256}"


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {number(value)}" for key, value in values.items()) or "none"


def _where(source: Source, store: Path) -> str:
    try:
        return f"found: {find_by_hash(source.hash, source.name, store)}"
    except UserError:
        return "NOT FOUND"

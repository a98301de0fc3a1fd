"""`list` and `show`: a table of a store, the manifest of an artifact, and the commands that reproduce it."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from fusion.files import read_json
from fusion.locks import holder, is_locked, run_lock_file
from fusion.store import lookup
from fusion.store.layout import MANIFEST, OLD, RUNS, STAGING
from fusion.store.lookup import Found, entries, find_by_hash, read_folder, scan, users_of
from fusion.store.settings_groups import Lookup, group
from fusion.store.writing import artifact_lock
from fusion.text import key_of, override, printable

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest
    from fusion.store.manifest_parts import Source

TITLES = ("name", "kind", "task", "backbone", "what", "seed", "score", "size", "when", "used by")


def list_store(store: Path) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return the rows of the table, titles first (empty if there are no artifacts), and lines to print below it."""
    lookup.check_store(store)
    found = list(scan(store))
    rows = [_row(f, f.manifest, found) for f in found if f.manifest is not None]
    lines = [] if rows else [f"{store} has no artifacts"]
    lines += _seeds(store, found)
    lines += [f"damaged: {f.place}: {f.problem}" for f in found if f.manifest is None]
    lines += [f"left: {text}" for _, text, _ in leftovers(store, found)]
    return [TITLES, *rows] if rows else [], [printable(line) for line in lines]


def _row(found: Found, manifest: Manifest, every: list[Found]) -> tuple[str, ...]:
    users = [user for user in users_of(manifest.hash, every) if user != found.place]
    cells = (
        found.place,
        manifest.kind,
        "+".join(manifest.task_names),
        manifest.backbone.name_or_path.rstrip("/").rsplit("/", 1)[-1],
        what_it_is(manifest),
        str(manifest.seed),
        first_score(manifest),
        as_bytes(size_of(found.folder)),
        when(found.folder / MANIFEST),
        ", ".join(users) or "-",
    )
    return tuple(printable(cell) for cell in cells)


def _seeds(store: Path, found: list[Found]) -> Iterator[str]:
    """Yield a line for each setting that was trained with more than one seed."""
    every = [(f.place, f.manifest) for f in found if f.manifest is not None and not f.replaced]
    settings = Lookup()
    for indices in group(settings.of_artifact(manifest, store) for _, manifest in every):
        places, manifests = zip(*(every[index] for index in indices), strict=True)
        if len({manifest.seed for manifest in manifests}) > 1:
            metrics, scores = zip(*map(_first, manifests), strict=True)
            line = f"{len(places)} seeds of one setting: {', '.join(places)}"
            if len(set(metrics)) == 1 and None not in scores:
                line += f": {metrics[0]} mean {number(fmean(scores))}, sd {number(stdev(scores))}"
            yield line


def leftovers(store: Path, found: Sequence[Found]) -> Iterator[tuple[Path, str, bool]]:
    """Yield each directory that is not an artifact, a line about it, and whether it can be deleted."""
    done = {f"{f.place}-{f.manifest.run.identity}" for f in found if f.manifest and not f.replaced}
    every = [(folder, _run(store, folder, folder.name in done)) for folder in entries(store / RUNS)]
    every += [(folder, _staged(store, folder)) for folder in entries(store / STAGING)]
    for folder, (what, unused) in every:
        about = f"{folder.parent.name}/{folder.name} ({as_bytes(size_of(folder))}, {when(folder)})"
        yield folder, f"{about}: {what}", unused


def _run(store: Path, folder: Path, stored: bool) -> tuple[str, bool]:
    # Check the lock first: a run may overwrite an artifact of the same identity.
    name = folder.name.rpartition("-")[0]
    path = run_lock_file(store, name)
    running = f"is being trained by {holder(path)}" if name and is_locked(path) else ""
    status = read_json(folder / "attempt.json").get("status")
    if running and status not in ("failed", "interrupted"):
        return f"running: it {running}", False
    if stored and not running:
        return "checkpoints of a finished run", True
    text = "a run that failed" if status == "failed" else "an interrupted run"
    resumes = "resumes" if any(folder.glob("*.ckpt")) else "reruns"
    text += f"; the same command {resumes} it; to discard it, delete the directory"
    # The lock is per name, so a run with a different identity may hold it.
    return f"{text}; {name} {running}" if running else text, False


def _staged(store: Path, folder: Path) -> tuple[str, bool]:
    name = re.sub(r"(~\w+|\.old)$", "", folder.name)
    if is_locked(artifact_lock(store, name)):
        return "running: it is being written", False
    if folder.name.endswith(OLD) and (folder / MANIFEST).is_file() and not (store / name / MANIFEST).is_file():
        return f"the only copy of {name}; the next run that writes {name} restores it", False
    return "partially written by a process that exited", True


def _first(manifest: Manifest) -> tuple[str, float | None]:
    return next((score for split in manifest.metrics.values() for score in split.items()), ("", None))


def what_it_is(manifest: Manifest) -> str:
    """Describe the placement of an adapter or the composition: `feedforward/normed`, `adapterfusion of 3`."""
    if manifest.composition is not None:
        return f"{manifest.composition.settings.name} of {len(manifest.sources)}"
    if manifest.adapter is not None:
        return f"{'+'.join(manifest.adapter.settings.sites)}/{manifest.adapter.settings.reads}"
    if manifest.lora is not None:
        ranks = manifest.bottleneck_sizes.values()
        least, most = min(ranks), max(ranks)
        return f"{'+'.join(manifest.sites)}/rank {least if least == most else f'{least} to {most}'}"
    return "-"


def first_score(manifest: Manifest) -> str:
    """Format the first validation metric, `accuracy 0.8125`, and whether training diverged."""
    metric, value = _first(manifest)
    return f"{metric} {number(value)}{' (diverged)' if manifest.result.diverged else ''}" if metric else "-"


def number(value: Any) -> str:
    return "null" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += 0 if path.is_dir() else path.lstat().st_size
    return total


def as_bytes(size: int) -> str:
    """Format a size: `1.23 MB`."""
    power = min((len(str(size)) - 1) // 3, 4)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def when(path: Path) -> str:
    with contextlib.suppress(OSError):
        return datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    return "-"


# Overrides that are set explicitly or, like sources_by, only affect how names were selected.
SET_EXPLICITLY = ("store", "name", "seed", "overwrite", "resume", "sources_by")


def describe(reference: str, store: Path, into: Path | None = None) -> list[str]:
    """Return the lines of `show`. `into` is the store that the commands write to, by default the same store."""
    folder, manifest = lookup.find_manifest(reference, store)
    lines = [f"{title:<14}{value}" for title, value in _facts(folder, manifest, store)]
    lines += ["", "to reproduce it:", *rebuild_lines(manifest, folder.parent, into or folder.parent)]
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
    yield "tokenizer", backbone.tokenizer or "unknown"
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
    changed = {True: ", with uncommitted changes", None: ", uncommitted changes unknown", False: ""}
    yield "git", f"{run.git.commit}{changed[run.git.dirty]}" if run.git else "unknown"
    yield "threads", "unknown" if run.threads is None else run.threads
    yield "run", f"{run.identity}, directory {run.directory}"
    yield "started in", run.folder or "unknown"
    for file, entry in manifest.files.items():
        yield "file", f"{file}, {entry.bytes:,} bytes ({as_bytes(entry.bytes)}), sha256 {entry.sha256}"


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {number(value)}" for key, value in values.items()) or "none"


def _where(source: Source, store: Path) -> str:
    try:
        return f"found: {find_by_hash(source.hash, source.name, store)}"
    except UserError:
        return "NOT FOUND"


def rebuild_lines(manifest: Manifest, store: Path, into: Path) -> list[str]:
    """Return shell commands that reproduce an artifact and its dependencies; missing ones become comments."""
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
    """Yield the dependencies, then the artifact, without duplicates; a message for each missing one."""
    if manifest.hash in seen:
        return
    seen.add(manifest.hash)
    origin = manifest.run.init_from
    parts = [(source.hash, source.name) for source in (*manifest.sources, *([origin] if origin else []))]
    if manifest.composition is not None and (pruned := manifest.composition.settings.fusion) is not None:
        parts.append(("", pruned))
    folds = manifest.run.config.get("inputs.folds", ())  # hashes of the artifacts of cross-fitting
    parts += [(hash, f"of fold {fold}") for fold, hash in enumerate(folds)]
    for hash, name in parts:
        try:
            folder = find_by_hash(hash, name, store) if hash else lookup.find(name, store)
            yield from _in_order(read_folder(folder), store, seen)
        except UserError as error:
            yield " ".join(str(error).split())
    yield manifest


def _command(manifest: Manifest, into: Path) -> str:
    run = manifest.run
    if not run.overrides:
        return f"# {manifest.name} was not created by a command"
    words = [word for word in run.overrides if key_of(word) not in SET_EXPLICITLY]
    data = run.config.get("data.dir")
    if isinstance(data, str) and "data.dir" not in map(key_of, words):  # set by FUSION_DATA_DIR
        words.append(override("data.dir", data))
    # Refer to sources by name, since paths would point to a different store.
    names: dict[str, Any] = {"sources": [source.name for source in manifest.sources]} if manifest.sources else {}
    if run.init_from is not None:
        names["init_from"] = run.init_from.name
    words = [override(key, names[key]) if (key := key_of(word)) in names else word for word in words]
    found = manifest.content["result"]
    seed = run.config.get("seed", manifest.seed) if "search" in found else manifest.seed
    own = {"name": manifest.name, "store": str(into.absolute()), "seed": seed}
    words += [override(key, value) for key, value in own.items()]
    variables = [f"{key}={shlex.quote(value)}" for key, value in run.environment.items()]
    stage = "stage2" if manifest.kind == "fusion" else "stage1"
    command = "select" if "selection" in found else stage
    return " ".join([*variables, "python", "-m", f"fusion.{command}", *map(shlex.quote, words)])

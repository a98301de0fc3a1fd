"""`list`: a table of a store, one line an artifact."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from fusion.store.layout import MANIFEST
from fusion.store.overview import Found, Leftover, check_store, everything, leftovers, size_of, users_of
from fusion.store.settings_groups import Lookup, group
from fusion.text import printable

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

TITLES = ("name", "kind", "task", "backbone", "what", "seed", "score", "size", "when", "used by")


def list_store(store: Path) -> tuple[list[tuple[str, ...]], list[str]]:
    """The rows of the table, titles first (none where there is no artifact), then lines.

    The lines: which artifacts differ by their seed alone and what they score together, what is damaged, what runs left.

    Raises:
        UserError: there is no such store.
    """
    check_store(store)
    found = everything(store)
    rows = [_row(f, f.manifest, found) for f in found if f.manifest is not None]
    lines = [] if rows else [f"{store} has no artifacts"]
    lines += [printable(line) for line in _seeds(store, found)]
    lines += [printable(f"damaged: {f.place}: {f.problem}") for f in found if f.manifest is None]
    return [TITLES, *rows] if rows else [], lines + [_left(left) for left in leftovers(store, found)]


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
    """A line for each setting that was trained with several seeds: mean and standard deviation of the first score."""
    lookup = Lookup(stores={store: [f.manifest for f in found if f.manifest is not None]})
    every = [(f.place, f.manifest) for f in found if f.manifest is not None and not f.replaced]
    for positions in group(lookup.of_artifact(manifest, store) for _, manifest in every):
        members = [every[position] for position in positions]
        if len({manifest.seed for _, manifest in members}) < 2:
            continue
        scores = [_first(manifest) for _, manifest in members]
        names, values = {name for name, _ in scores}, [value for _, value in scores if value is not None]
        summary = ""
        if len(names) == 1 and len(values) == len(members):
            summary = f": {names.pop()} mean {number(fmean(values))}, sd {number(stdev(values))}"
        yield f"{len(members)} seeds of one setting: {', '.join(place for place, _ in members)}{summary}"


def _first(manifest: Manifest) -> tuple[str, float | None]:
    for split in manifest.metrics.values():
        for metric, value in split.items():
            return metric, float(value) if isinstance(value, (int, float)) else None
    return "", None


def _left(left: Leftover) -> str:
    return (
        f"left: {printable(left.place)} ({as_bytes(size_of(left.folder))}, {when(left.folder)}): {left.what}"
    )


def what_it_is(manifest: Manifest) -> str:
    """Where an adapter stands, or how a fusion combines: `feedforward/normed`, `adapterfusion of 3`."""
    if manifest.composition is not None:
        return f"{manifest.composition.settings.name} of {len(manifest.sources)}"
    if manifest.adapter is not None:
        return f"{'+'.join(manifest.adapter.settings.sites)}/{manifest.adapter.settings.reads}"
    return "-"


def first_score(manifest: Manifest) -> str:
    """The first metric of the first validation split: `accuracy 0.8125`; and whether the training diverged."""
    for split in manifest.metrics.values():
        for metric, value in split.items():
            return f"{metric} {number(value)}{' (diverged)' if manifest.result.diverged else ''}"
    return "-"


def number(value: Any) -> str:
    return "null" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def as_bytes(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def when(path: Path) -> str:
    """When a file was last written, in local time."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    except (OSError, OverflowError, ValueError):
        return "-"

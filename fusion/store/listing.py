"""`list`: a table of a store, one line per artifact."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from fusion.store.layout import MANIFEST
from fusion.store.leftovers import leftovers, size_of
from fusion.store.lookup import Found, check_store, scan, users_of
from fusion.store.settings_groups import Lookup, group
from fusion.text import printable

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

TITLES = ("name", "kind", "task", "backbone", "what", "seed", "score", "size", "when", "used by")


def list_store(store: Path) -> tuple[list[tuple[str, ...]], list[str]]:
    """The rows of the table, titles first (none if there is not an artifact), and lines to print below it.

    The lines: artifacts that differ only by their seed, with mean and standard deviation of their score; what is
    damaged; what runs have left.

    Raises:
        UserError: the store does not exist.
    """
    check_store(store)
    found = list(scan(store))
    rows = [_row(f, f.manifest, found) for f in found if f.manifest is not None]
    lines = [] if rows else [f"{store} has no artifacts"]
    lines += _seeds(store, found)
    lines += [f"damaged: {f.place}: {f.problem}" for f in found if f.manifest is None]
    lines += [
        f"left: {left.place} ({as_bytes(left.size)}, {when(left.folder)}): {left.what}"
        for left in leftovers(store, found)
    ]
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
    """A line for each setting that was trained with more than one seed."""
    every = [(f.place, f.manifest) for f in found if f.manifest is not None and not f.replaced]
    lookup = Lookup(stores={store: [f.manifest for f in found if f.manifest is not None]})
    for positions in group(lookup.of_artifact(manifest, store) for _, manifest in every):
        places, manifests = zip(*(every[position] for position in positions), strict=True)
        if len({manifest.seed for manifest in manifests}) > 1:
            metrics, scores = zip(*map(_first, manifests), strict=True)
            line = f"{len(places)} seeds of one setting: {', '.join(places)}"
            if len(set(metrics)) == 1 and None not in scores:
                line += f": {metrics[0]} mean {number(fmean(scores))}, sd {number(stdev(scores))}"
            yield line


def _first(manifest: Manifest) -> tuple[str, float | None]:
    """The first metric of the first validation split."""
    return next((score for split in manifest.metrics.values() for score in split.items()), ("", None))


def what_it_is(manifest: Manifest) -> str:
    """The placement of an adapter, or the composition of a fusion: `feedforward/normed`, `adapterfusion of 3`."""
    if manifest.composition is not None:
        return f"{manifest.composition.settings.name} of {len(manifest.sources)}"
    if manifest.adapter is not None:
        return f"{'+'.join(manifest.adapter.settings.sites)}/{manifest.adapter.settings.reads}"
    return "-"


def first_score(manifest: Manifest) -> str:
    """The first metric of the first validation split, `accuracy 0.8125`, and whether the training diverged."""
    metric, value = _first(manifest)
    return f"{metric} {number(value)}{' (diverged)' if manifest.result.diverged else ''}" if metric else "-"


def number(value: Any) -> str:
    """A value of a manifest for a person."""
    return "null" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def as_bytes(size: int) -> str:
    """A size for a person: `1.23 MB`."""
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

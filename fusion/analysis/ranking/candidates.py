"""The adapters of a store that `sources=all` selects, and why others are excluded. Reads manifests only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.errors import UserError
from fusion.store.compatibility import why_unfit
from fusion.store.layout import OLD
from fusion.store.lookup import artifacts, names

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest


@dataclass(frozen=True)
class Candidates:
    """Adapters that can be fused with each other, sorted by name; the reason for each excluded adapter."""

    sources: list[Manifest]
    left_out: dict[str, str]

    def left_out_line(self) -> str:
        """One line; empty if none is excluded."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        parts = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
        return f"excluded: {'; '.join(parts)}" if parts else ""


def all_adapters(store: Path, backbone: str, without_task: str | None = None) -> Candidates:
    """Every adapter that was trained on this backbone, with the tokenizer and placement that most of them have.

    Args:
        backbone: name or path, as in a manifest.
        without_task: leave out adapters that were trained on this task.

    Raises:
        UserError: no adapter can be fused.
    """
    readable = {folder.name.removesuffix(OLD): manifest for folder, manifest in artifacts(store)}
    left_out = {
        name: "cannot be read, see python -m fusion.store verify" for name in names(store) if name not in readable
    }

    def keep(manifests: Iterable[Manifest], problem: Callable[[Manifest], str | None]) -> list[Manifest]:
        problems = [(manifest, problem(manifest)) for manifest in manifests]
        left_out.update({manifest.name: reason for manifest, reason in problems if reason is not None})
        return [manifest for manifest, reason in problems if reason is None]

    adapters = [manifest for manifest in readable.values() if manifest.kind == "adapter"]
    # A folder may have the same weights as another name.
    prints = {m.backbone.fingerprint for m in adapters if _is_same(m.backbone.name_or_path, backbone)}
    sources = keep(
        adapters,
        lambda m: None if m.backbone.fingerprint in prints else f"trained on backbone {m.backbone.name_or_path}",
    )
    sources = keep(sources, why_unfit)
    tokenizer = _most_common(m.backbone.tokenizer for m in sources if m.backbone.tokenizer)
    sources = keep(
        sources,
        lambda m: (
            None
            if m.backbone.tokenizer in (None, tokenizer)
            else f"tokenizer {str(m.backbone.tokenizer)[:8]}, most have {str(tokenizer)[:8]}"
        ),
    )
    own = f"trained on {without_task} itself, use include_target=true to include it"
    sources = keep(sources, lambda m: own if without_task in m.task_names else None)
    placement = _most_common(map(_placement, sources))
    sources = keep(sources, lambda m: None if _placement(m) == placement else f"{_placement(m)}, most have {placement}")
    found = Candidates(sources, left_out)
    if not sources:
        line = found.left_out_line()
        raise UserError(
            f"sources=all: the store {store} has no adapters for {backbone}{f'; {line}' if line else ''}\n"
            "Train one with python -m fusion.stage1 +task=NAME, or set store=DIR or backbone=NAME as in stage 1"
        )
    return found


def _most_common(values: Iterable[str]) -> str | None:
    """The first of equally frequent ones."""
    return next((value for value, _ in Counter(values).most_common(1)), None)


def _is_same(one: str, other: str) -> bool:
    return one == other or (Path(one).is_dir() and Path(other).is_dir() and Path(one).samefile(other))


def _placement(manifest: Manifest) -> str:
    """What sources of a fusion must share, for a message."""
    placement = manifest.placement
    return (
        f"{'+'.join(placement['adapter.sites'])}/{placement['adapter.reads']} "
        f"on weights {manifest.backbone.fingerprint[:8]}"
    )

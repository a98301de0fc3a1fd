"""Which adapters of a store `sources=all` means, and why others are not among them. Manifests only."""

from __future__ import annotations

from collections import Counter
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
    """sources: that can be fused with each other, by name. left_out: the others' names, with the reason."""

    sources: list[Manifest]
    left_out: dict[str, str]

    def left_out_line(self, before: str = "") -> str:
        """One line; empty where nothing was left out."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        parts = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
        return f"{before}left out: {'; '.join(parts)}" if parts else ""


def all_adapters(store: Path, backbone: str, without_task: str | None = None) -> Candidates:
    """Every adapter of the store that was trained on this backbone, in the placement that most of them have.

    Args:
        backbone: name or path, as a manifest has it.
        without_task: leaves out what was trained on this task, alone or among others; None: nothing.

    Raises:
        UserError: none is left; says what there is.
    """
    read = {folder.name.removesuffix(OLD): manifest for folder, manifest in artifacts(store)}
    damaged = dict.fromkeys(
        (name for name in names(store) if name not in read),
        "cannot be read, python -m fusion.store verify says why",
    )
    adapters = [manifest for manifest in read.values() if manifest.kind == "adapter"]
    if not adapters:
        raise UserError(
            f"sources=all: the store {store} has no adapters; python -m fusion.stage1 +task=NAME makes one, "
            f"and store=DIR names another store{Candidates([], damaged).left_out_line(before='; ')}"
        )
    # A folder may hold the very weights that have a name elsewhere.
    prints = {m.backbone.fingerprint for m in adapters if _same(m.backbone.name_or_path, backbone)}
    here = [manifest for manifest in adapters if manifest.backbone.fingerprint in prints]
    if not here:
        there = ", ".join(sorted({m.backbone.name_or_path for m in adapters}))
        raise UserError(
            f"sources=all: no adapter of {store} was trained on {backbone}, only on {there}\n"
            "Say backbone=… as in stage 1, or backbone.name_or_path=NAME"
        )
    left_out = damaged | {
        m.name: f"backbone {m.backbone.name_or_path}"
        for m in adapters
        if m.backbone.fingerprint not in prints
    }
    left_out |= {m.name: reason for m in here if (reason := why_unfit(m)) is not None}
    here = [manifest for manifest in here if manifest.name not in left_out]
    tokenizers = Counter(known for m in here if (known := m.backbone.tokenizer) is not None)
    usual = max(tokenizers, key=lambda known: tokenizers[known], default=None)
    left_out |= {
        m.name: f"trained with another tokenizer ({str(m.backbone.tokenizer)[:8]}, most have {usual[:8]})"
        for m in here
        if usual is not None and m.backbone.tokenizer not in (None, usual)
    }
    here = [manifest for manifest in here if manifest.name not in left_out]
    own = [m for m in here if without_task in m.task_names] if without_task is not None else []
    left_out |= {m.name: f"trained on {without_task} itself, include_target=true takes it in" for m in own}
    others = [manifest for manifest in here if manifest not in own]
    kinds = Counter(map(_kind, others))
    # The most frequent; of equally many, that of the first name.
    most = max(kinds, key=lambda kind: kinds[kind]) if kinds else ""
    for manifest in others:
        if _kind(manifest) != most:
            left_out[manifest.name] = f"{_kind(manifest)}, most have {most}"
    sources = [manifest for manifest in others if _kind(manifest) == most]
    found = Candidates(sources, left_out)
    if not sources:
        raise UserError(f"sources=all: no adapter is left to take; {found.left_out_line()}")
    return found


def _same(one: str, other: str) -> bool:
    return one == other or (Path(one).is_dir() and Path(other).is_dir() and Path(one).samefile(other))


def _kind(manifest: Manifest) -> str:
    """Backbone and placement in words: what two sources of a fusion must share."""
    placement = manifest.placement
    return (
        f"{'+'.join(placement['adapter.sites'])}/{placement['adapter.reads']} "
        f"on weights {manifest.backbone.fingerprint[:8]}"
    )

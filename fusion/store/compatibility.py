"""Which artifacts, backbones and commands go together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusion.config.compositions import COMPOSITIONS
from fusion.errors import UserError
from fusion.text import hydra_value, repeated, shortened

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

DEBUG = "-debug"  # ending of the name of what debug=NAME trains
DIVERGED = "-diverged"  # ending of the name of the best state before the loss was no longer finite


def differences(pairs: Mapping[str, tuple[Any, Any]], most: int = 4) -> str:
    """`key VALUE, expected VALUE` for each pair (expected, found) that differs; of hashes the first 8 digits."""

    def shown(value: Any) -> str:
        return shortened(re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1", hydra_value(value)), 200)

    found = [f"{key} {shown(there)}, expected {shown(here)}" for key, (here, there) in pairs.items() if here != there]
    more = f"; and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more


def why_unfit(manifest: Manifest) -> str | None:
    """Why `sources=all`, rankings and proposed commands leave an adapter out; None: they use it."""
    if manifest.name.endswith(DEBUG):
        return "trained with debug="
    if manifest.name.endswith(DIVERGED) or manifest.result.diverged:
        return "its training diverged"
    return None


def check_sources(manifests: list[Manifest]) -> None:
    """Refuse sources that cannot be fused together.

    All are adapters of one backbone (fingerprint, tokenizer, hidden size) in one placement (sites, reads). Bottleneck
    sizes, non-linearities, scalings and layers may differ.

    Raises:
        UserError: which source, and how it differs from the first.
    """
    for manifest in manifests:
        if manifest.kind != "adapter":
            raise UserError(
                f"sources: {manifest.name} is a stored {manifest.kind}, expected an adapter; train one with "
                f"python -m fusion.stage1 +task={manifest.task.name} method=adapter"
            )
    if duplicates := repeated(manifest.name for manifest in manifests):
        raise UserError(f"sources: duplicate names {', '.join(duplicates)}")
    for other in manifests[1:]:
        first = manifests[0]
        one, two = first.backbone, other.backbone
        pairs = {
            "fingerprint": (one.fingerprint, two.fingerprint),
            "tokenizer": _known(one.tokenizer, two.tokenizer),
            "hidden size": (one.hidden_size, two.hidden_size),
        }
        pairs |= {key: (value, other.placement[key]) for key, value in first.placement.items()}
        if found := differences(pairs):
            raise UserError(
                f"sources: {other.name} cannot be fused with {first.name}: {found} (backbone {two.name_or_path}, "
                f"{one.name_or_path}). Leave it out of sources=, or train it again on the same backbone and placement"
            )


def _known(one: str | None, two: str | None) -> tuple[str | None, str | None]:
    """A pair that is equal if one of the two is not known, as in manifests of version 0.1."""
    return one or two, two or one


def check_drop(manifest: Manifest, drop: int) -> None:
    """Refuse to drop layers that an artifact does not have.

    Raises:
        UserError: it is no adapter and no fusion, or has fewer layers.
    """
    if drop and manifest.kind not in ("adapter", "fusion"):
        raise UserError(
            f"drop={drop}: {manifest.name} is a stored {manifest.kind}; layers can be dropped of adapters and fusions only"
        )
    if drop > manifest.backbone.layers:
        raise UserError(
            f"drop={drop}: the backbone of {manifest.name} has {manifest.backbone.layers} layers; expected fewer"
        )


def check_attends(manifest: Manifest, given: str, fix: str) -> None:
    """Refuse to show source attention weights of an artifact without them.

    Args:
        given: the override that selects them.
        fix: what to do instead.

    Raises:
        UserError: it is no fusion, or its composition has no attention weights.
    """
    if manifest.kind != "fusion":
        raise UserError(f"{given}: {manifest.name} is a stored {manifest.kind}, only a fusion has source attention")
    name = manifest.made_by
    if why := COMPOSITIONS[name].no_weights:
        raise UserError(f"{given}: {manifest.name} (composition={name}) {why}; {fix}")


def check_trust(manifest: Manifest, trusted: bool) -> None:
    """Refuse to run the custom code of an artifact's backbone unless the user allows it."""
    if manifest.backbone.trust_remote_code and not trusted:
        raise UserError(
            f"{manifest.name}: its backbone {manifest.backbone.name_or_path} runs custom code; set "
            "backbone.trust_remote_code=true if you have read it and trust it"
        )


def check_backbone(
    manifest: Manifest, *, name_or_path: str, fingerprint: str, hidden_size: int, tokenizer: str | None = None
) -> None:
    """Refuse a backbone that an artifact was not trained on.

    Args:
        tokenizer: its hash; manifests of version 0.1 have none to compare with.

    Raises:
        UserError: which artifact, and how the backbone differs.
    """
    stored = manifest.backbone
    pairs: dict[str, tuple[Any, Any]] = {
        "fingerprint": (stored.fingerprint, fingerprint),
        "hidden size": (stored.hidden_size, hidden_size),
        "tokenizer": _known(stored.tokenizer, tokenizer),
    }
    if found := differences(pairs):
        revision = f" revision {stored.revision}" if stored.revision else ""
        raise UserError(
            f"{manifest.name} was trained on {stored.name_or_path}{revision}, and {name_or_path} is another backbone: "
            f"{found}\nRestore its files, or use a copy of the right backbone: backbone.name_or_path=FOLDER"
        )

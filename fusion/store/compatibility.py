"""Which artifacts, backbones and commands go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusion.config.compositions import COMPOSITIONS
from fusion.errors import UserError
from fusion.text import repeated

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

DEBUG = "-debug"  # ending of the name of what debug=NAME trains
DIVERGED = "-diverged"  # ending of the name of the best state before the loss was no longer finite


def why_unfit(manifest: Manifest) -> str | None:
    """Why `sources=all`, rankings and proposed commands leave an adapter out; None: they use it."""
    if manifest.name.endswith(DEBUG):
        return "trained with debug="
    if manifest.name.endswith(DIVERGED) or manifest.result.diverged:
        return "its training diverged"
    return None


def check_sources(manifests: list[Manifest]) -> None:
    """Refuse sources that cannot be fused together.

    All are adapters of one backbone (fingerprint, hidden size) in one placement (sites, reads). Bottleneck sizes,
    non-linearities, scalings and layers may differ.

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
        if differences := _differences(manifests[0], other):
            raise UserError(
                f"sources: {other.name} cannot be fused with {manifests[0].name}: {'; '.join(differences)}. "
                "Leave it out of sources=, or train it again on the same backbone and placement"
            )


def _differences(first: Manifest, other: Manifest) -> list[str]:
    one, two = first.backbone, other.backbone
    found = []
    if one.fingerprint != two.fingerprint:
        if one.name_or_path != two.name_or_path:
            found.append(f"backbone {two.name_or_path}, expected {one.name_or_path}")
        else:
            found.append(
                f"backbone {two.name_or_path} with fingerprint {two.fingerprint[:8]}, expected {one.fingerprint[:8]}"
            )
    if one.tokenizer and two.tokenizer and one.tokenizer != two.tokenizer:
        found.append(
            f"backbone {two.name_or_path} with tokenizer {two.tokenizer[:8]}, expected {one.tokenizer[:8]}"
        )
    here = {"hidden size": one.hidden_size} | first.placement
    there = {"hidden size": two.hidden_size} | other.placement
    found += [
        f"{key} {_shown(there[key])}, expected {_shown(here[key])}" for key in here if here[key] != there[key]
    ]
    return found


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def check_drop(manifest: Manifest, drop: int) -> None:
    """Refuse to drop layers that an artifact does not have.

    Raises:
        UserError: it is no adapter and no fusion, or has fewer layers.
    """
    if drop and manifest.kind not in ("adapter", "fusion"):
        raise UserError(
            f"drop={drop}: {manifest.name} is a stored {manifest.kind}, only adapters and fusions support drop="
        )
    if drop > manifest.backbone.layers:
        raise UserError(
            f"drop={drop}: {manifest.name} has {manifest.backbone.layers} layers, expected at most that"
        )


def check_attends(manifest: Manifest, given: str, fix: str) -> None:
    """Refuse to show source attention weights of an artifact without them.

    Args:
        given: the override that asks for them.
        fix: what to do instead.

    Raises:
        UserError: it is no fusion, or its composition has no attention weights.
    """
    if manifest.kind != "fusion":
        raise UserError(
            f"{given}: {manifest.name} is a stored {manifest.kind}, only a fusion has source attention"
        )
    name = manifest.made_by
    if why := COMPOSITIONS[name].no_weights:
        raise UserError(f"{given}: {manifest.name} (composition={name}) {why}; {fix}")


def check_trust(manifest: Manifest, trusted: bool) -> None:
    """Refuse to run the custom code of an artifact's backbone unless the user allows it.

    Raises:
        UserError: names the setting that allows it.
    """
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
    if (stored.fingerprint, stored.hidden_size) != (fingerprint, hidden_size):
        revision = f" revision {stored.revision}" if stored.revision else ""
        raise UserError(
            f"{manifest.name} was trained on {stored.name_or_path}{revision} (fingerprint {stored.fingerprint[:8]}, "
            f"hidden size {stored.hidden_size}), and {name_or_path} has fingerprint {fingerprint[:8]}, hidden size "
            f"{hidden_size}: it needs the same backbone"
        )
    if stored.tokenizer and tokenizer and stored.tokenizer != tokenizer:
        raise UserError(
            f"{manifest.name} was trained with another tokenizer than that of {name_or_path} (hash "
            f"{stored.tokenizer[:8]} in its manifest, {tokenizer[:8]} here)\n"
            "Restore the tokenizer's files, or use another copy of the backbone: backbone.name_or_path=FOLDER"
        )

"""Which artifacts, backbones and commands go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusion.config.compositions import COMPOSITIONS
from fusion.errors import UserError
from fusion.text import repeated

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest


def check_sources(manifests: list[Manifest]) -> None:
    """Refuses sources that cannot be fused together.

    All are adapters of one backbone (fingerprint, hidden size) in one placement (sites, reads). Bottleneck
    sizes, non-linearities, scalings and layers may differ.

    Raises:
        UserError: which source, and how it differs from the first.
    """
    for manifest in manifests:
        if manifest.kind != "adapter":
            raise UserError(
                f"sources: {manifest.name} is a stored {manifest.kind}, and only adapters can be combined; "
                f"train one with python -m fusion.stage1 +task={manifest.task.name} method=adapter"
            )
    if twice := repeated(manifest.name for manifest in manifests):
        raise UserError(
            f"sources: two of them are named {', '.join(twice)}, and a source is known by its name"
        )
    for other in manifests[1:]:
        differences = _differences(manifests[0], other)
        if differences:
            raise UserError(
                f"sources: {other.name} cannot be fused with {manifests[0].name}: {'; '.join(differences)}. "
                "Leave it out of sources=, or train it again on the same backbone and placement"
            )


def _differences(first: Manifest, other: Manifest) -> list[str]:
    one, two = first.backbone, other.backbone
    found = []
    if one.name_or_path != two.name_or_path and one.fingerprint != two.fingerprint:
        found.append(f"backbone {two.name_or_path} and not {one.name_or_path}")
    elif one.fingerprint != two.fingerprint:
        found.append(
            f"backbone {two.name_or_path} has other weights "
            f"(fingerprint {two.fingerprint[:8]} and not {one.fingerprint[:8]})"
        )
    if None not in (one.tokenizer, two.tokenizer) and one.tokenizer != two.tokenizer:
        found.append(
            f"backbone {two.name_or_path} has another tokenizer "
            f"(hash {str(two.tokenizer)[:8]} and not {str(one.tokenizer)[:8]})"
        )
    if one.hidden_size != two.hidden_size:
        found.append(f"hidden size {two.hidden_size} and not {one.hidden_size}")
    here, there = first.placement, other.placement
    found += [
        f"{key} {_shown(there[key])} and not {_shown(here[key])}" for key in here if here[key] != there[key]
    ]
    return found


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def check_drop(manifest: Manifest, drop: int) -> None:
    """Refuses to leave layers out of an artifact that has none to leave out.

    Raises:
        UserError: it is no adapter and no fusion, or has fewer layers.
    """
    if drop and manifest.kind not in ("adapter", "fusion"):
        raise UserError(
            f"drop={drop}: {manifest.name} is a stored {manifest.kind}; only adapters and fusions can be dropped layer "
            "by layer, so leave drop= out"
        )
    if drop > manifest.backbone.layers:
        raise UserError(
            f"drop={drop}: {manifest.name} has {manifest.backbone.layers} layers; expected no more"
        )


def check_attends(manifest: Manifest, asked: str, cure: str) -> None:
    """Refuses to show whom an artifact attends to that attends to nothing.

    Args:
        asked, cure: how it was asked for, and what to do without it.

    Raises:
        UserError: it is no fusion, or one that reports no weights of its sources.
    """
    if manifest.kind != "fusion":
        raise UserError(
            f"{asked}: {manifest.name} is a stored {manifest.kind}; only a fusion has attention to show"
        )
    name = manifest.made_by
    if why := COMPOSITIONS[name].no_weights:
        raise UserError(f"{asked}: {manifest.name} (composition={name}) {why}; {cure}")


def check_trust(manifest: Manifest, trusted: bool) -> None:
    """Refuses to go without code that an artifact's backbone was run with, and to run it on the artifact's word.

    Raises:
        UserError: names the key that the user has to say again.
    """
    if manifest.backbone.trust_remote_code and not trusted:
        raise UserError(
            f"{manifest.name}: its backbone {manifest.backbone.name_or_path} runs code of its own; say "
            "backbone.trust_remote_code=true if you have read it and trust it"
        )


def check_backbone(
    manifest: Manifest, *, name_or_path: str, fingerprint: str, hidden_size: int, tokenizer: str | None = None
) -> None:
    """Refuses to put an artifact's weights on a backbone that they were not trained on.

    Args:
        tokenizer: the hash of the backbone's; manifests of 0.1 have none to compare it with.

    Raises:
        UserError: which artifact, and how the backbone differs.
    """
    stored = manifest.backbone
    if stored.fingerprint == fingerprint and stored.hidden_size == hidden_size:
        trained_with = stored.tokenizer
        if None not in (trained_with, tokenizer) and trained_with != tokenizer:
            raise UserError(
                f"{manifest.name} was trained with another tokenizer than {name_or_path} has (hash "
                f"{str(trained_with)[:8]} in its manifest, {str(tokenizer)[:8]} here): text would become other tokens\n"
                "Restore the tokenizer's files, or use another copy of the backbone: backbone.name_or_path=FOLDER"
            )
        return
    how = f"{name_or_path} has fingerprint {fingerprint[:8]}"
    if stored.hidden_size != hidden_size:
        how += f" and hidden size {hidden_size} (not {stored.hidden_size})"
    revision = f" revision {stored.revision}" if stored.revision else ""
    raise UserError(
        f"{manifest.name} was trained on {stored.name_or_path}{revision} with fingerprint "
        f"{stored.fingerprint[:8]}, and {how}: it needs the very same backbone"
    )

"""Which artifacts, backbones, data and commands go together."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.config.compositions import COMPOSITIONS
from fusion.config.data import DataConfig, SplitConfig
from fusion.errors import UserError
from fusion.text import hydra_value, repeated, shortened

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

log = logging.getLogger(__name__)

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


def check_attends(manifest: Manifest, given: str, fix: str) -> None:
    """Refuse to show attention weights, with the override `given`, of an artifact without them; `fix`: what to do."""
    if manifest.kind != "fusion":
        raise UserError(f"{given}: {manifest.name} is a stored {manifest.kind}, only a fusion has source attention")
    name = manifest.made_by
    if why := COMPOSITIONS[name].no_weights:
        raise UserError(f"{given}: {manifest.name} (composition={name}) {why}; {fix}")


def check_backbone(
    manifest: Manifest, *, name_or_path: str, fingerprint: str, hidden_size: int, tokenizer: str | None = None
) -> None:
    """Refuse a backbone that an artifact was not trained on; `tokenizer` is its hash."""
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


# --- data of the training -------------------------------------------------------------------------


def data_folder_of(manifest: Manifest) -> str | None:
    """What data.dir was, relative to here or to where the training started; None: data of the hub or PyPI."""
    trained = manifest.run.config.get("data.dir")
    if not isinstance(trained, str):
        return None
    there = Path(str(manifest.run.folder or ".")) / trained
    return str(there) if not Path(trained).is_dir() and there.is_dir() else trained


def note_ambiguous_labels(manifest: Manifest) -> None:
    """Warn of an artifact of version 0.1 whose labels may have been read wrongly.

    It read booleans and integers as ids, even where labels are such values in another order: `["true", "false"]`.
    """
    for task in manifest.tasks:
        if manifest.data.labels.get(task.name) is not None or task.label_values:
            continue
        names = [str(name) for name in task.labels or ()]
        ids = [{"false": "0", "true": "1"}.get(name.lower(), name) for name in names]
        if any(id.isdecimal() and int(id) != number for number, id in enumerate(ids)):
            log.warning(
                "%s: version 0.1 may have read the labels %s of %s as ids, which mean others; if its scores are wrong, "
                "train it again with overwrite=true",
                manifest.name,
                ", ".join(names),
                task.name,
            )


def split_of(manifest: Manifest) -> SplitConfig:
    """The `data.split` of the training."""
    config = manifest.run.config
    keys = [(field.name, f"data.split.{field.name}") for field in fields(SplitConfig)]
    try:
        return SplitConfig(**{name: config[key] for name, key in keys if key in config})
    except (UserError, TypeError) as error:
        raise UserError(f"manifest of {manifest.name}: run.config: {error}") from None


def as_trained(manifest: Manifest, data: DataConfig, task: str | None) -> DataConfig:
    """`data` with the split and quoting of the training; unchanged for a task that the artifact was not trained on.

    Raises:
        UserError: `data.split` is set to something else, so that training examples would be scored.
    """
    if task not in manifest.task_names:
        return data
    split = split_of(manifest)
    if data.split not in (SplitConfig(), split):
        asked, trained = (" ".join(one.overrides()) or "none" for one in (data.split, split))
        raise UserError(
            f"{asked}: {manifest.name} was trained with another ({trained}), whose training examples would be scored; "
            "leave data.split out"
        )
    quoting = data.quoting or manifest.run.config.get("data.quoting")
    return replace(data, split=split, quoting=quoting if quoting in ("csv", "none") else None)

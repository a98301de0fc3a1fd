"""Compatibility checks of artifacts with each other, and with backbones, datasets and commands."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.config.compositions import COMPOSITIONS
from fusion.config.data import DataConfig, LimitConfig, SplitConfig
from fusion.errors import UserError
from fusion.text import hydra_value, repeated, shortened

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest
    from fusion.store.manifest_parts import Backbone

log = logging.getLogger(__name__)

DEBUG = "-debug"  # suffix of artifacts trained with debug=NAME
DIVERGED = "-diverged"  # suffix of artifacts saved before the loss became NaN or infinite


def differences(pairs: Mapping[str, tuple[Any, Any]], most: int = 4) -> str:
    """Format each (expected, found) pair that differs as `key FOUND, expected VALUE`, abbreviating hashes."""

    def shown(value: Any) -> str:
        return shortened(re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1", hydra_value(value)), 200)

    found = [f"{key} {shown(there)}, expected {shown(here)}" for key, (here, there) in pairs.items() if here != there]
    more = f"; and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more


def own_adapters(sources: Sequence[Manifest], target: str | None) -> tuple[int, ...]:
    """Return the indices of the sources that were trained on the target task alone."""
    return tuple(n for n, source in enumerate(sources) if source.task_names == [target])


def why_unfit(manifest: Manifest) -> str | None:
    """Return why `sources=all`, rankings and suggested commands skip an adapter, or None if they use it."""
    if manifest.name.endswith(DEBUG):
        return "trained with debug="
    if manifest.name.endswith(DIVERGED) or manifest.result.diverged:
        return "training diverged"
    if manifest.run.config.get("data.leave_out") is not None:
        return "trained for cross-fitting, without a fold of its examples"
    return None


def check_sources(manifests: list[Manifest]) -> None:
    """Raise UserError if sources cannot be fused: all must have the same backbone and `Manifest.placement`."""
    for manifest in manifests:
        if manifest.kind == "lora" and manifest.lora is None:
            raise UserError(
                f"sources: {manifest.name} does not describe its LoRA in each layer, since it was stored by an earlier "
                "version or changes linear layers outside of the transformer's layers; retrain it with overwrite=true"
            )
        if manifest.kind not in ("adapter", "lora"):
            raise UserError(
                f"sources: {manifest.name} is a stored {manifest.kind}, expected an adapter or a LoRA; train one with "
                f"python -m fusion.stage1 +task={manifest.task.name} method=adapter"
            )
    if duplicates := repeated(manifest.name for manifest in manifests):
        raise UserError(f"sources: duplicate names {', '.join(duplicates)}")
    for other in manifests[1:]:
        first = manifests[0]
        one, two = first.backbone, other.backbone
        pairs = _backbone_pairs(one, two.fingerprint, two.hidden_size, two.tokenizer)
        pairs |= {key: (value, other.placement.get(key)) for key, value in first.placement.items()}
        if found := differences(pairs):
            raise UserError(
                f"sources: {other.name} cannot be fused with {first.name}: {found} (backbone {two.name_or_path}, "
                f"{one.name_or_path}). Remove it from sources=, or retrain it on the same backbone with the same placement"
            )


def _backbone_pairs(
    stored: Backbone, fingerprint: str, hidden_size: int, tokenizer: str | None
) -> dict[str, tuple[Any, Any]]:
    return {
        "fingerprint": (stored.fingerprint, fingerprint),
        # Unknown in manifests of version 0.1.
        "tokenizer": (stored.tokenizer or tokenizer, tokenizer or stored.tokenizer),
        "hidden size": (stored.hidden_size, hidden_size),
    }


def check_attends(manifest: Manifest, given: str, fix: str) -> None:
    """Raise UserError if an artifact has no attention weights. `given` is the override; `fix` ends the message."""
    if manifest.kind != "fusion":
        raise UserError(f"{given}: {manifest.name} is a stored {manifest.kind}, but only a fusion has source attention")
    name = manifest.made_by
    if why := COMPOSITIONS[name].no_weights:
        raise UserError(f"{given}: {manifest.name} (composition={name}) {why}; {fix}")


def check_backbone(
    manifest: Manifest, *, name_or_path: str, fingerprint: str, hidden_size: int, tokenizer: str | None = None
) -> None:
    """Raise UserError if an artifact was trained on a different backbone. `tokenizer` is its hash."""
    stored = manifest.backbone
    if found := differences(_backbone_pairs(stored, fingerprint, hidden_size, tokenizer)):
        revision = f" revision {stored.revision}" if stored.revision else ""
        raise UserError(
            f"{manifest.name} was trained on {stored.name_or_path}{revision}, but {name_or_path} is a different "
            f"backbone: {found}\nSet backbone.name_or_path=DIR to a copy of the original backbone"
        )


def data_folder_of(manifest: Manifest) -> str | None:
    """Return data.dir, relative to the current or the training run's directory. None: Hub or PyPI data."""
    trained = manifest.run.config.get("data.dir")
    if not isinstance(trained, str):
        return None
    there = Path(str(manifest.run.folder or ".")) / trained
    return str(there) if not Path(trained).is_dir() and there.is_dir() else trained


def note_ambiguous_labels(manifest: Manifest) -> None:
    """Warn if version 0.1 may have misread labels such as `["true", "false"]`, where each could be the id of another."""
    for task in manifest.tasks:
        if manifest.data.labels.get(task.name) is not None or task.label_values:
            continue
        names = [str(name) for name in task.labels or ()]
        ids = [{"false": "0", "true": "1"}.get(name.lower(), name) for name in names]
        if any(id.isdecimal() and int(id) != number for number, id in enumerate(ids)):
            log.warning(
                "%s: version 0.1 may have read the labels %s of %s as ids of different labels; if its metrics are "
                "wrong, retrain it with overwrite=true",
                manifest.name,
                ", ".join(names),
                task.name,
            )


def split_of(manifest: Manifest) -> SplitConfig:
    """Return the `data.split` of the training run."""
    config = manifest.run.config
    keys = [(field.name, f"data.split.{field.name}") for field in fields(SplitConfig)]
    try:
        return SplitConfig(**{name: config[key] for name, key in keys if key in config})
    except (UserError, TypeError) as error:
        raise UserError(f"manifest of {manifest.name}: run.config: {error}") from None


def limit_of(manifest: Manifest, train: int | None) -> LimitConfig:
    """Return the limit to `train` examples that samples them as in the training run."""
    seed = manifest.run.config.get("data.limit.train_seed")
    return LimitConfig(train=train, train_seed=seed if train is not None and type(seed) is int else None)


def as_trained(manifest: Manifest, data: DataConfig, task: str | None) -> DataConfig:
    """Return `data` with split and quoting of the training on `task`, if any. Raises UserError for a different split."""
    if task not in manifest.task_names:
        return data
    split = split_of(manifest)
    if data.split not in (SplitConfig(), split):
        asked, trained = (" ".join(one.overrides()) or "none" for one in (data.split, split))
        raise UserError(
            f"{asked}: {manifest.name} was trained with a different split ({trained}), so its training examples would "
            "be evaluated; remove data.split"
        )
    quoting = data.quoting or manifest.run.config.get("data.quoting")
    return replace(data, split=split, quoting=quoting if quoting in ("csv", "none") else None)

"""The identity of a run: a hash over everything that determines its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from fusion.config.compositions import CompositionConfig
from fusion.config.fields import default_of
from fusion.config.methods import MethodConfig
from fusion.errors import UserError
from fusion.text import flat, is_within

# Names, places, logging and hardware do not change the numbers.
NOT_IDENTITY = (
    *("logger", "store", "name", "overwrite", "resume", "checkpoint_minutes", "hydra"),
    *("data.cache_dir", "data.workers", "backbone.gradient_checkpointing", "backbone.cache_gb"),
)
NOT_IDENTITY_TRAINER = (
    *("accelerator", "strategy", "devices", "num_nodes", "num_sanity_val_steps", "log_every_n_steps"),
    *("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "deterministic", "benchmark"),
    *("inference_mode", "profiler", "detect_anomaly", "barebones", "default_root_dir"),
    *("enable_autolog_hparams", "model_registry"),
)


def _defaults(group: Any, without: Sequence[str]) -> dict[str, Any]:
    return {f"{group.group}.{f.name}": default_of(f) for f in fields(group) if f.name not in without}


# Keys that the first stores do not have, with their defaults. A default is omitted from the identity, so that a run
# made before the key existed keeps its identity.
ADDED_LATER: dict[str, Any] = {
    "tasks": None,
    "backbone.trust_remote_code": False,
    **_defaults(MethodConfig, without=("name",)),
    "adapter.drop": None,
    "adapter.shared": False,
    **_defaults(CompositionConfig, without=CompositionConfig.first),
    "sources_by": None,
    "data.quoting": None,
    "data.split.validation": None,
    "data.split.test": None,
    "data.split.seed": 0,
    "data.split.stratify": False,
    "init_from": None,
    "loss.class_weights": None,
    "loss.label_smoothing": 0.0,
}


def identity_config(config: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """The part of a resolved config that determines the numbers, flat: `{"optim.lr": 1e-4, ...}`, and "inputs.KEY"."""
    left_out = (*NOT_IDENTITY, *(f"trainer.{key}" for key in NOT_IDENTITY_TRAINER))
    absent = object()
    found = {
        key: json.loads(json.dumps(value, default=str))  # as it will be read back
        for key, value in flat(config)
        if not is_within(key, left_out) and value != ADDED_LATER.get(key, absent)
    }
    return found | dict(flat({"inputs": inputs} if inputs else {}))


def identity(config: dict[str, Any], inputs: dict[str, Any] | None = None) -> str:
    """12 hex digits, equal for two runs exactly if they should give the same numbers."""
    text = json.dumps(identity_config(config, inputs), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differing_keys(stored: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """The differences between two identity configs, such as "optim.lr: 0.0001 there, 0.0005 here"."""

    def shown(config: dict[str, Any], key: str) -> str:
        known = ADDED_LATER | config
        value = known.get(key)
        if key.startswith("inputs.") and isinstance(value, list):  # hashes
            value = [str(item)[:8] for item in value]
        return json.dumps(value, default=str) if key in known else "nothing"

    def difference(key: str) -> str:
        names = asked.get("sources")
        if key == "inputs.sources" and names and names == stored.get("sources"):  # retrained since
            hashes = zip(names, stored.get(key, ()), asked.get(key, ()), strict=False)
            changed = [(name, there[:8], here[:8]) for name, there, here in hashes if there != here]
            return "sources: " + ", ".join(
                f"{name} is another artifact now ({there} there, {here} here)" for name, there, here in changed
            )
        return f"{key}: {shown(stored, key)} there, {shown(asked, key)} here"

    absent = object()
    keys = sorted({*stored, *asked})
    return [difference(key) for key in keys if stored.get(key, absent) != asked.get(key, absent)]


def is_done(
    name: str, stored: tuple[str, dict[str, Any]] | None, asked: tuple[str, dict[str, Any]], overwrite: bool
) -> bool:
    """Whether the store already has what a run would train.

    Args:
        stored, asked: identity and identity config of the artifact of this name (None if absent), and of the run.

    Raises:
        UserError: an artifact with other settings has the name, and `overwrite` is not set.
    """
    if stored is None or overwrite:
        return False
    if stored[0] == asked[0]:
        return True
    keys = differing_keys(stored[1], asked[1])
    fix = "Keep both with name=ANOTHER, or replace it with overwrite=true"
    planned, more = (config.get("trainer.max_epochs") for config in (stored[1], asked[1]))
    if len(keys) == 1 and type(planned) is int and type(more) is int and planned < more:
        fix = (
            "Its learning rate has decayed to zero, so that it cannot be continued exactly. Train from its weights with "
            f"a new schedule: name=ANOTHER init_from={name}; or train all epochs: overwrite=true"
        )
    some = "; ".join(keys[:6]) + (f"; and {len(keys) - 6} more" if len(keys) > 6 else "")
    raise UserError(f"the store has another {name}: {some or 'made from other inputs'}\n{fix}")

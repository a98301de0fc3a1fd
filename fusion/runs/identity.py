"""The identity of a run: a hash over all settings that affect its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from fusion.config.compositions import CompositionConfig
from fusion.config.data import SplitConfig
from fusion.config.fields import default_of
from fusion.config.methods import MethodConfig
from fusion.config.training import LossConfig, OptimConfig
from fusion.errors import UserError
from fusion.text import flat, is_within

# Names, directories, logging and hardware do not affect the results.
NOT_IDENTITY = (
    *("logger", "store", "name", "overwrite", "resume", "checkpoint_minutes", "hydra"),
    *("data.cache_dir", "data.workers", "backbone.gradient_checkpointing", "backbone.cache_gb"),
    *("backbone.accept_licence", "backbone.rates"),  # the learning rate is in optim.lr
)
NOT_IDENTITY_TRAINER = (
    *("accelerator", "strategy", "devices", "num_nodes", "num_sanity_val_steps", "log_every_n_steps"),
    *("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "deterministic", "benchmark"),
    *("inference_mode", "profiler", "detect_anomaly", "barebones", "default_root_dir"),
    *("enable_autolog_hparams", "model_registry"),
)


def _defaults(group: Any, without: Sequence[str] = ()) -> dict[str, Any]:
    return {f"{group.group}.{f.name}": default_of(f) for f in fields(group) if f.name not in without}


_OPTIM_ADDED = ("epochs", "min_steps")

# Keys added after the first stores, with their defaults. Defaults are omitted from the identity, so that runs from
# before the key existed keep their identity.
ADDED_LATER: dict[str, Any] = {
    "tasks": None,
    "backbone.trust_remote_code": False,
    "backbone.dtype": "float32",
    "backbone.encoder_only": False,
    "adapter.stacks": None,
    **_defaults(MethodConfig, without=("name",)),
    "adapter.drop": None,
    "adapter.shared": False,
    **_defaults(CompositionConfig, without=CompositionConfig.first),
    "sources_by": None,
    "data.quoting": None,
    **{"data.leave_out": None, "data.validation_fold": None},
    "data.limit.train_seed": None,
    **_defaults(SplitConfig),
    "init_from": None,
    "head.init": "zero",
    **{"search": False, "search_rates": None, "search_seeds": 1},
    **{f"optim.{key}": default_of(next(f for f in fields(OptimConfig) if f.name == key)) for key in _OPTIM_ADDED},
    **_defaults(LossConfig),
}


def identity_config(config: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the flat part of a config that affects the results: `{"optim.lr": 1e-4, ...}` and "inputs.KEY"."""
    left_out = (*NOT_IDENTITY, *(f"trainer.{key}" for key in NOT_IDENTITY_TRAINER))
    if (config.get("trainer") or {}).get("max_epochs") is not None:  # these settings then have no effect
        left_out += tuple(f"optim.{key}" for key in _OPTIM_ADDED)
    absent = object()
    found = {
        key: json.loads(json.dumps(value, default=str))  # as read back from JSON
        for key, value in ((key, _as_before(key, value)) for key, value in flat(config))
        if not is_within(key, left_out) and value != ADDED_LATER.get(key, absent)
    }
    return found | dict(flat({"inputs": inputs} if inputs else {}))


def _as_before(key: str, value: Any) -> Any:
    """Return the value that a run with the same result had before null became the default of `backbone.pooling`.

    Families whose default is not `cls` refuse it.
    """
    return "cls" if key == "backbone.pooling" and value is None else value


def identity(config: dict[str, Any], inputs: dict[str, Any] | None = None) -> str:
    """Return 12 hex digits that are equal for runs with equal results."""
    text = json.dumps(identity_config(config, inputs), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differing_keys(stored: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Return the differences between two identity configs, such as "optim.lr: 0.0001 stored, 0.0005 now"."""

    def shown(config: dict[str, Any], key: str) -> str:
        known = ADDED_LATER | config
        value = known.get(key)
        if key.startswith("inputs.") and isinstance(value, list):  # hashes
            value = [str(item)[:8] for item in value]
        return json.dumps(value, default=str) if key in known else "nothing"

    absent, lines = object(), []
    for key in sorted({*stored, *asked}):
        there, here, names = stored.get(key, absent), asked.get(key, absent), asked.get("sources")
        if there == here:
            continue
        if key == "inputs.sources" and names and names == stored.get("sources"):  # retrained meanwhile
            hashes = zip(names, stored.get(key, ()), asked.get(key, ()), strict=False)
            words = [f"{name} has changed ({old[:8]} stored, {new[:8]} now)" for name, old, new in hashes if old != new]
            lines.append(f"sources: {', '.join(words)}")
        else:
            lines.append(f"{key}: {shown(stored, key)} stored, {shown(asked, key)} now")
    return lines


def name_conflict(name: str, stored: dict[str, Any], asked: dict[str, Any]) -> UserError:
    """Return the error for a stored artifact with this name and a different identity config."""
    keys = differing_keys(stored, asked)
    fix = "Set name=NAME to keep both, or overwrite=true to replace it"
    planned, more = (config.get("trainer.max_epochs") for config in (stored, asked))
    if len(keys) == 1 and type(planned) is int and type(more) is int and planned < more:
        fix = (
            f"Its learning rate has decayed to zero: set name=NAME init_from={name} to train from its weights with a new "
            "schedule, or overwrite=true to retrain it"
        )
    some = "; ".join(keys[:6]) + (f"; and {len(keys) - 6} more" if len(keys) > 6 else "")
    return UserError(f"the store already contains a different {name}: {some or 'its inputs differ'}\n{fix}")

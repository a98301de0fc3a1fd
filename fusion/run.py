"""One run: what it is (its identity) and what it leaves behind (status, result, config, log).

No Hydra and no torch here. A run writes into its own output directory; what it trains goes to the
store, and its checkpoints to `STORE/.runs/NAME-IDENTITY`, where the same command finds them again.
"""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fusion.errors import UserError

# What a run is called, where it writes and how it is watched: none of it changes the numbers.
NOT_IDENTITY = (
    "logger",
    "store",
    "name",
    "overwrite",
    "resume",
    "hydra",
    "data.cache_dir",
    "data.workers",
    "backbone.gradient_checkpointing",
    "backbone.cache_gb",
)
NOT_IDENTITY_TRAINER = (
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "num_sanity_val_steps",
    "log_every_n_steps",
    "enable_checkpointing",
    "enable_progress_bar",
    "enable_model_summary",
    "deterministic",
    "benchmark",
    "inference_mode",
    "profiler",
    "detect_anomaly",
    "barebones",
    "default_root_dir",
    "enable_autolog_hparams",
    "model_registry",
)


# Keys that the first stores did not know, with the value that says what was so without them: it is left out, so that
# a run of then is the same run now.
ADDED_LATER: tuple[tuple[str, Any], ...] = (
    ("tasks", None),
    ("backbone.trust_remote_code", False),
    ("method.temperature", 2.0),
    ("method.rank", 8),
    ("method.alpha", 8),
    ("method.dropout", 0.0),
    ("method.targets", ["query", "value"]),
    ("adapter.drop", None),
    ("adapter.shared", False),
    ("composition.rank", None),
    ("composition.target_adapter", False),
    ("composition.train", False),
    ("composition.fusion", None),
    ("composition.keep", None),
    ("composition.drop", None),
)


class Terminated(BaseException):
    """SIGTERM, as an exception: the job gets to say that it was interrupted. Exit code 143."""


@dataclass(frozen=True)
class Run:
    """One job of a command, as the command's function sees it.

    Attributes:
        command: "stage1", "stage2", ...
        directory: the output directory of this job.
        overrides: the overrides that started this job, Hydra's own left out.
        config: the resolved config as plain containers.
        group: the experiment's name, or the sweep's folder name, or the command's name.
        rank_zero: false in every process of a DDP job but the first: it stores and logs nothing.
    """

    command: str
    directory: Path
    overrides: tuple[str, ...]
    config: dict[str, Any]
    group: str
    rank_zero: bool = True


def identity_config(config: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """The part of a resolved config that decides the numbers, flat: `{"optim.lr": 1e-4, ...}`.

    Args:
        inputs: what the config only names, such as the sources' hashes; they appear as "inputs.KEY".
    """
    left_out = {*NOT_IDENTITY, *(f"trainer.{key}" for key in NOT_IDENTITY_TRAINER)}
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if prefix in left_out:
            return
        if isinstance(value, dict) and value:
            for key in sorted(value, key=str):
                walk(f"{prefix}.{key}" if prefix else str(key), value[key])
        elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            for number, entry in enumerate(value):
                walk(f"{prefix}.{number}", entry)
        elif prefix and (prefix, value) not in ADDED_LATER:
            flat[prefix] = json.loads(json.dumps(value, default=str))  # as it will be read back

    walk("", config)
    walk("inputs", inputs or {})
    flat.pop("inputs", None)
    return flat


def identity(config: dict[str, Any], inputs: dict[str, Any] | None = None) -> str:
    """12 hex digits that two runs share exactly if the same numbers are to come out of them."""
    text = json.dumps(identity_config(config, inputs), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differing_keys(stored: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """How two identity configs differ, one entry a key: "optim.lr: 0.0001 there, 0.0005 here"."""

    def shown(config: dict[str, Any], key: str) -> str:
        known = dict(ADDED_LATER) | config
        value = known.get(key)
        if key.startswith("inputs.") and isinstance(value, list):  # hashes
            value = [str(entry)[:8] for entry in value]
        return json.dumps(value, default=str) if key in known else "nothing"

    return [
        f"{key}: {shown(stored, key)} there, {shown(asked, key)} here"
        for key in sorted({*stored, *asked})
        if stored.get(key) != asked.get(key) or (key in stored) != (key in asked)
    ]


def is_done(
    name: str,
    stored: tuple[str, dict[str, Any]] | None,
    asked: tuple[str, dict[str, Any]],
    overwrite: bool,
) -> bool:
    """Whether the store already holds what a run would make, so that there is nothing to do.

    Args:
        stored: identity and identity config of the artifact that has this name; None: there is none.
        asked: identity and identity config of the run.
        overwrite: train in any case and replace what is there.

    Raises:
        UserError: something else has this name.
    """
    if stored is None or overwrite:
        return False
    if stored[0] == asked[0]:
        return True
    keys = differing_keys(stored[1], asked[1])
    some = "; ".join(keys[:6]) + (f"; and {len(keys) - 6} more" if len(keys) > 6 else "")
    raise UserError(
        f"the store has another {name}: {some or 'made from other inputs'}\n"
        f"keep both with name=ANOTHER, or replace it with overwrite=true"
    )


def checkpoint_folder(store: Path, name: str, identity: str) -> Path:
    """Where the run's checkpoints lie while it is not done."""
    return Path(store) / ".runs" / f"{name}-{identity}"


def write_json(path: Path, content: Any) -> None:
    """Writes whole or not at all: a reader never sees half a file."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(part, path)


def caused_by_interrupt(error: BaseException) -> BaseException | None:
    """The KeyboardInterrupt or Terminated behind an error, if there is one.

    Lightning makes SystemExit(1) of a Ctrl-C, and what is torn down after one may fail in its turn:
    either way somebody wanted the program to stop.
    """
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, KeyboardInterrupt | Terminated):
        seen = seen.__cause__ or seen.__context__
    return seen


def record(run: Run, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Does a job's work and leaves its traces: config.yaml, status.json, result.json, run.log.

    status.json says `running`, then `done`, `failed` or `interrupted`. The traceback of a failed
    job stands at the end of its run.log. Only the first process of a DDP job writes.

    Raises:
        Whatever `work` raises; KeyboardInterrupt or Terminated for an interrupted job.
    """
    if not run.rank_zero:
        return work()
    run.directory.mkdir(parents=True, exist_ok=True)
    tasks = run.config.get("tasks") or [run.config.get("task") or {}]
    status: dict[str, Any] = {
        "status": "running",
        "command": run.command,
        "name": run.config.get("name") or run.config.get("artifact"),
        "task": "+".join(task["name"] for task in tasks if task.get("name")) or None,
        "overrides": list(run.overrides),
        "error": None,
        "started": _now(),
        "ended": None,
    }

    def say(now: str, error: str | None = None) -> None:
        status.update(status=now, error=error, ended=None if now == "running" else _now())
        write_json(run.directory / "status.json", status)

    _write_config(run)
    say("running")
    try:
        result = work()
        write_json(run.directory / "result.json", result)
    except BaseException as error:
        interrupt = caused_by_interrupt(error)
        with open(run.directory / "run.log", "a", encoding="utf-8") as log:
            log.write(traceback.format_exc())
        if interrupt is None:
            say("failed", describe(error))
            raise
        say("interrupted", describe(interrupt))
        raise interrupt from error
    say("done")
    return result


def describe(error: BaseException) -> str:
    """The one line (for a UserError: its message) that says what went wrong."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _write_config(run: Run) -> None:
    import yaml

    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    (run.directory / "config.yaml").write_text(text, encoding="utf-8")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

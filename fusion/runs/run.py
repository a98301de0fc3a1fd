"""One run: what it is (its identity) and what it leaves behind (status, result, config, log).

No Hydra and no torch here. A run writes into its own output directory; what it trains goes to the
store, and its checkpoints to `STORE/.runs/NAME-IDENTITY`, where the same command finds them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fusion.config.checks import default_of
from fusion.config.model import CompositionConfig, MethodConfig
from fusion.errors import TrainingError, UserError
from fusion.runs.signals import Terminated, held

log = logging.getLogger(__name__)

# What a run is called, where it writes and how it is watched: none of it changes the numbers.
NOT_IDENTITY = (
    "logger",
    "store",
    "name",
    "overwrite",
    "resume",
    "checkpoint_minutes",
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


# What lies in a run's folder, by the names that scripts rely on.
STATUS, RESULT, CONFIG = "status.json", "result.json", "config.yaml"
HISTORY, ATTENTION, OUTCOMES = "history.jsonl", "attention.jsonl", "outcomes.json"
INSPECTION = "inspection.json"


def _defaults(group: Any, without: Sequence[str]) -> list[tuple[str, Any]]:
    return [(f"{group.group}.{f.name}", default_of(f)) for f in fields(group) if f.name not in without]


# Keys that the first stores did not know, with the value that says what was so without them: it is left out, so that
# a run of then is the same run now.
ADDED_LATER: tuple[tuple[str, Any], ...] = (
    ("tasks", None),
    ("backbone.trust_remote_code", False),
    *_defaults(MethodConfig, without=("name",)),
    ("adapter.drop", None),
    ("adapter.shared", False),
    *_defaults(CompositionConfig, without=CompositionConfig.first),
    ("sources_by", None),
    ("data.quoting", None),
    ("data.split.validation", None),
    ("data.split.test", None),
    ("data.split.seed", 0),
    ("data.split.stratify", False),
    ("init_from", None),
    ("loss.class_weights", None),
    ("loss.label_smoothing", 0.0),
)


_EPOCHS = "trainer.max_epochs"


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


@dataclass(frozen=True)
class RunState:
    """How a run stands before it starts.

    Attributes:
        state: "new", "done", "interrupted", "failed".
        detail: where it goes on, or why it failed.
    """

    state: str
    detail: str = ""


class RecordError(TrainingError):
    """A job did its work, and what it leaves in its own folder could not be written."""


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

    def difference(key: str) -> str:
        columns = [
            column if isinstance(column, list) else []
            for column in (asked.get("sources"), stored.get(key), asked.get(key))
        ]
        alike = asked.get("sources") == stored.get("sources") and len(set(map(len, columns))) == 1
        if key == "inputs.sources" and alike and columns[0]:
            changed = [
                f"{name} is another artifact now ({there[:8]} there, {here[:8]} here)"
                for name, there, here in zip(*columns, strict=True)
                if there != here
            ]
            return f"sources: {', '.join(changed)}"
        return f"{key}: {shown(stored, key)} there, {shown(asked, key)} here"

    return [
        difference(key)
        for key in sorted({*stored, *asked})
        if stored.get(key) != asked.get(key) or (key in stored) != (key in asked)
    ]


def is_done(
    name: str,
    stored: tuple[str, dict[str, Any]] | None,
    asked: tuple[str, dict[str, Any]],
    overwrite: bool,
    epochs: int | None = None,
) -> bool:
    """Whether the store already holds what a run would make, so that there is nothing to do.

    Args:
        stored: identity and identity config of the artifact that has this name; None: there is none.
        asked: identity and identity config of the run.
        overwrite: train in any case and replace what is there.
        epochs: that the artifact was trained for, where that is known.

    Raises:
        UserError: something else has this name.
    """
    if stored is None or overwrite:
        return False
    if stored[0] == asked[0]:
        return True
    keys = differing_keys(stored[1], asked[1])
    planned, more = (config.get(_EPOCHS) for config in (stored[1], asked[1]))
    if len(keys) == 1 and type(planned) is int and type(more) is int and planned < more:
        early = f", and it had stopped early, after epoch {epochs}" if epochs and epochs < planned else ""
        raise UserError(
            f"the store has another {name}: {keys[0]}; more epochs would not continue it exactly, since its learning "
            f"rate has decayed to zero over the {planned}{early}\n"
            f"name=ANOTHER init_from={name} starts this run from its weights with a schedule of its own; overwrite=true trains "
            f"all {more} epochs"
        )
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
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes whole or not at all, as `write_json`."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def check_folder(folder: Path, key: str, other: str = "DIR names another folder") -> None:
    """Makes an output folder, and sees that a file can be written there.

    Args:
        key, other: the override that names the folder, and what it can say instead.

    Raises:
        UserError: it cannot be made or written, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Tried with real bytes: permissions do not tell of read-only disks, nor an empty file of full ones.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        raise _unwritable(folder, error, key, other) from error


def _unwritable(place: Path, error: OSError, key: str, other: str = "DIR names another folder") -> UserError:
    return UserError(f"{place}: cannot be written ({error.strerror or error})\n{key}={other}")


def caused_by_interrupt(error: BaseException) -> BaseException | None:
    """The KeyboardInterrupt or Terminated behind an error, if there is one, or the error if it ends the process.

    Lightning makes SystemExit(1) of a Ctrl-C, and what is torn down after one may fail in its turn:
    either way somebody wanted the program to stop. submitit ends it so when a job's turn is over.
    """
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, KeyboardInterrupt | Terminated):
        seen = seen.__cause__ or seen.__context__
    return error if seen is None and isinstance(error, SystemExit) else seen


def record(
    run: Run, work: Callable[[], dict[str, Any]], check: Callable[[], RunState | None] | None = None
) -> dict[str, Any]:
    """Does a job's work and leaves its traces: config.yaml, status.json, result.json, run.log.

    status.json says `running`, then `done`, `failed` or `interrupted`. The traceback of a failed
    job stands at the end of its run.log. Only the first process of a DDP job writes.

    A folder that cannot be written any more hides neither what the work gave nor what went wrong in it.

    Args:
        check: is called before the work; how the run stands then is kept as status.json's "before".

    Raises:
        UserError: the run's folder cannot be written from the start.
        RecordError: the work is done, and its result could not be written.
        Whatever `work` and `check` raise; KeyboardInterrupt or Terminated for an interrupted job.
    """
    if not run.rank_zero:
        if check is not None:
            check()
        return work()
    tasks = run.config.get("tasks") or [run.config.get("task") or {}]
    status: dict[str, Any] = {
        "status": "running",
        "before": None,
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
        write_json(run.directory / STATUS, status)

    def say_why(now: str, reason: BaseException, error: BaseException) -> None:
        try:
            with open(run.directory / "run.log", "a", encoding="utf-8") as file:
                where = (
                    traceback.format_exception(error) if now == "failed" else [f"{now}: {describe(reason)}\n"]
                )
                file.write("".join(where))
            say(now, describe(reason))
        except OSError as fault:  # the error itself is what the user has to see
            if not isinstance(error, RecordError):
                log.warning("%s: cannot be written (%s)", run.directory, fault.strerror or fault)

    unwritable: UserError | None = None
    try:
        try:
            with held():
                run.directory.mkdir(parents=True, exist_ok=True)
                _write_config(run)
                say("running")
        except OSError as error:
            unwritable = _unwritable(run.directory, error, "hydra.run.dir")
            raise unwritable from error
        if check is not None and (standing := check()) is not None:
            status["before"] = standing.state
            with contextlib.suppress(OSError):
                say("running")
        result = work()
    except BaseException as error:
        if error is unwritable:
            raise
        interrupt = caused_by_interrupt(error)
        with held():
            if interrupt is None:
                say_why("failed", error, error)
                raise
            say_why("interrupted", interrupt, error)
        if interrupt is error:
            raise
        raise interrupt from error
    try:
        with held():
            write_json(run.directory / RESULT, result)
            say("done")
    except OSError as error:
        kept = (
            f"{result['artifact']} is stored whole"
            if {"stage", "artifact"} <= result.keys()
            else "it went well"
        )
        fault = RecordError(
            f"{kept}, but {run.directory} cannot be written any more ({error.strerror or error})\n"
            "Make room there, or say hydra.run.dir=DIR: the same command again writes result.json"
        )
        say_why("failed", fault, fault)
        raise fault from error
    return result


class RunLog(logging.FileHandler):
    """run.log. A disk that fills ends it with one line on the terminal, and not with a traceback for each line."""

    _ended = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not self._ended:
            self._ended = True
            reason = getattr(error, "strerror", None) or error
            with contextlib.suppress(OSError):
                print(f"{self.baseFilename}: cannot be written any more ({reason})", file=sys.stderr)


def describe(error: BaseException) -> str:
    """The one line (for a UserError: its message) that says what went wrong."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _write_config(run: Run) -> None:
    import yaml

    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    (run.directory / CONFIG).write_text(text, encoding="utf-8")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

"""One job of a command: its folder and what is written there (config, status, result, log).

Neither Hydra nor torch is imported here. Trained weights go to the store, checkpoints to `STORE/.runs/NAME-IDENTITY`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fusion.errors import TrainingError, UserError
from fusion.files import write_json
from fusion.runs.signals import Terminated, held

log = logging.getLogger(__name__)

# The files of a run's folder.
STATUS, RESULT, CONFIG = "status.json", "result.json", "config.yaml"
HISTORY, ATTENTION, OUTCOMES = "history.jsonl", "attention.jsonl", "outcomes.json"
INSPECTION = "inspection.json"


@dataclass(frozen=True)
class Run:
    """One job of a command.

    Attributes:
        command: "stage1", "stage2", ...
        directory: the job's output directory.
        overrides: the overrides of this job, without Hydra's own.
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
    """The state of a run before it starts.

    Attributes:
        state: "new", "done", "interrupted" or "failed".
        detail: from where it resumes, or why it failed.
    """

    state: str
    detail: str = ""


class RecordError(TrainingError):
    """A job is done, but its result could not be written to its folder."""


def check_folder(folder: Path, key: str, other: str = "DIR names another folder") -> None:
    """Create an output folder and check that files can be written there.

    Args:
        key, other: the override that names the folder, and the value that the message proposes.

    Raises:
        UserError: it cannot be created or written, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions do not show a read-only disk, nor an empty file a full one.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        raise _unwritable(folder, error, key, other) from error


def _unwritable(place: Path, error: OSError, key: str, other: str = "DIR names another folder") -> UserError:
    return UserError(f"{place}: cannot be written ({error.strerror or error})\n{key}={other}")


def caused_by_interrupt(error: BaseException) -> BaseException | None:
    """The KeyboardInterrupt or Terminated in an error's chain of causes, or a SystemExit; else None.

    Lightning turns Ctrl-C into SystemExit(1), and the cleanup that follows may raise further errors; submitit ends
    a preempted job with SystemExit.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt | Terminated):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None and isinstance(error, SystemExit) else cause


def describe(error: BaseException) -> str:
    """An error in one line; a UserError by its message."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def record(
    run: Run, work: Callable[[], dict[str, Any]], check: Callable[[], RunState | None] | None = None
) -> dict[str, Any]:
    """Run a job and write config.yaml, status.json, result.json and, on failure, the traceback to run.log.

    The status is `running`, then `done`, `failed` or `interrupted`. Only the first process of a DDP job writes.

    Args:
        check: called before `work`; the state that it returns is kept as status.json's "before".

    Raises:
        UserError: the run's folder cannot be written from the start.
        RecordError: the job is done, but its result could not be written.
        Whatever `work` and `check` raise; KeyboardInterrupt or Terminated for an interrupted job.
    """
    if not run.rank_zero:
        if check is not None:
            check()
        return work()
    status = _first_status(run)

    def write_status(state: str, error: str | None = None) -> None:
        status.update(status=state, error=error, ended=None if state == "running" else _now())
        write_json(run.directory / STATUS, status)

    def write_failure(state: str, reason: BaseException, error: BaseException) -> None:
        try:
            with open(run.directory / "run.log", "a", encoding="utf-8") as file:
                failed = state == "failed"
                file.writelines(traceback.format_exception(error) if failed else [f"{state}: {describe(reason)}\n"])
            write_status(state, describe(reason))
        except OSError as fault:  # must not hide the error itself
            if not isinstance(error, RecordError):
                log.warning("%s: cannot be written (%s)", run.directory, fault.strerror or fault)

    unwritable: UserError | None = None
    try:
        try:
            with held():
                run.directory.mkdir(parents=True, exist_ok=True)
                _write_config(run)
                write_status("running")
        except OSError as error:
            unwritable = _unwritable(run.directory, error, "hydra.run.dir")
            raise unwritable from error
        if check is not None and (before := check()) is not None:
            status["before"] = before.state
            with contextlib.suppress(OSError):
                write_status("running")
        result = work()
    except BaseException as error:
        if error is unwritable:
            raise
        interrupt = caused_by_interrupt(error)
        with held():
            write_failure("interrupted" if interrupt else "failed", interrupt or error, error)
        if interrupt is None or interrupt is error:
            raise
        raise interrupt from error
    try:
        with held():
            write_json(run.directory / RESULT, result)
            write_status("done")
    except OSError as error:
        is_artifact = {"stage", "artifact"} <= result.keys()
        stored = f"{result['artifact']} is stored" if is_artifact else "the job is done"
        fault = RecordError(
            f"{stored}, but {run.directory} cannot be written any more ({error.strerror or error})\n"
            "Free some space there, or set hydra.run.dir=DIR, and run the same command again to write result.json"
        )
        write_failure("failed", fault, fault)
        raise fault from error
    return result


class RunLog(logging.FileHandler):
    """run.log. When the disk is full, one line on the terminal replaces a traceback per record."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not self._failed:
            self._failed = True
            reason = getattr(error, "strerror", None) or error
            with contextlib.suppress(OSError):
                print(f"{self.baseFilename}: cannot be written any more ({reason})", file=sys.stderr)


def _first_status(run: Run) -> dict[str, Any]:
    tasks = run.config.get("tasks") or [run.config.get("task") or {}]
    return {
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


def _write_config(run: Run) -> None:
    import yaml

    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    (run.directory / CONFIG).write_text(text, encoding="utf-8")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

"""One job of a command: its directory and the files in it (config, status, result, log)."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fusion.errors import TrainingError, UserError
from fusion.files import now, unwritable, write_json
from fusion.runs.signals import Terminated, held

log = logging.getLogger(__name__)

# Files in the directory of a run.
STATUS, RESULT, CONFIG = "status.json", "result.json", "config.yaml"
HISTORY, ATTENTION, OUTCOMES = "history.jsonl", "attention.jsonl", "outcomes.json"
INSPECTION = "inspection.json"


@dataclass(frozen=True)
class Run:
    """One job of a command."""

    command: str  # "stage1", "stage2", ...
    directory: Path  # output directory
    overrides: tuple[str, ...]  # without those of Hydra itself
    config: dict[str, Any]  # resolved, plain containers
    group: str  # name of the experiment, sweep directory or command
    rank_zero: bool = True  # whether this process saves and logs


class RunState(NamedTuple):
    """State of a run before it starts: new, done, interrupted or failed; where it resumes, or why it failed."""

    state: str
    detail: str = ""


def caused_by_interrupt(error: BaseException) -> BaseException | None:
    """Return the KeyboardInterrupt, Terminated or SystemExit that caused an error, or None."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt | Terminated):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None and isinstance(error, SystemExit) else cause


def describe(error: BaseException) -> str:
    """Format an error on one line; a UserError as its message."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def record(
    run: Run, work: Callable[[], dict[str, Any]], check: Callable[[], RunState | None] | None = None
) -> dict[str, Any]:
    """Run a job and write config.yaml, status.json, result.json and, on failure, the traceback to run.log.

    The status is `running`, then `done`, `failed` or `interrupted`. Only rank 0 writes. The state that `check` returns
    before `work` is stored in status.json as "before".

    Raises UserError if the output directory is not writable, TrainingError if the job is done but its result could not
    be written, and KeyboardInterrupt or Terminated if the job is interrupted.
    """
    if not run.rank_zero:
        if check is not None:
            check()
        return work()
    import yaml

    status = _first_status(run)

    def write_status(state: str, error: str | None = None) -> None:
        status.update(status=state, error=error, ended=None if state == "running" else now())
        write_json(run.directory / STATUS, status)

    def write_failure(error: BaseException, interrupt: BaseException | None = None) -> None:
        with held(), contextlib.suppress(OSError):  # must not replace the original error
            with open(run.directory / "run.log", "a", encoding="utf-8") as file:
                trace = [f"interrupted: {describe(interrupt)}\n"] if interrupt else traceback.format_exception(error)
                file.writelines(trace)
            write_status("interrupted" if interrupt else "failed", describe(interrupt or error))

    try:
        try:
            with held():
                run.directory.mkdir(parents=True, exist_ok=True)
                text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
                (run.directory / CONFIG).write_text(text, encoding="utf-8")
                write_status("running")
        except OSError as error:
            raise unwritable("hydra.run.dir", run.directory, error) from error
        if check is not None and (before := check()) is not None:
            status["before"] = before.state
            with contextlib.suppress(OSError):
                write_status("running")
        result = work()
    except BaseException as error:
        interrupt = caused_by_interrupt(error)
        write_failure(error, interrupt)
        if interrupt is None or interrupt is error:
            raise
        raise interrupt from error
    try:
        with held():
            write_json(run.directory / RESULT, result)
            write_status("done")
    except OSError as error:
        is_artifact = {"stage", "artifact"} <= result.keys()
        stored = f"{result['artifact']} was saved" if is_artifact else "the job is done"
        fault = TrainingError(
            f"{stored}, but {run.directory} is no longer writable ({error.strerror or error}); free disk space or set "
            "hydra.run.dir=DIR, and rerun the command to write result.json"
        )
        write_failure(fault)
        raise fault from error
    return result


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
        "started": now(),
        "ended": None,
    }

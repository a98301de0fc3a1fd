"""One job of a command: its folder and what is written there (config, status, result, log).

Neither Hydra nor torch is imported here. Trained weights go to the store, checkpoints to `STORE/.runs/NAME-IDENTITY`.
"""

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

# The files of a run's folder.
STATUS, RESULT, CONFIG = "status.json", "result.json", "config.yaml"
HISTORY, ATTENTION, OUTCOMES = "history.jsonl", "attention.jsonl", "outcomes.json"
INSPECTION = "inspection.json"


@dataclass(frozen=True)
class Run:
    """One job of a command."""

    command: str  # "stage1", "stage2", ...
    directory: Path  # of its output
    overrides: tuple[str, ...]  # without Hydra's own
    config: dict[str, Any]  # resolved, plain containers
    group: str  # the experiment's name, or the sweep's folder name, or the command's name
    rank_zero: bool = True  # false in every process of a DDP job but the first: it stores and logs nothing


class RunState(NamedTuple):
    """The state of a run before it starts: new, done, interrupted or failed; from where it resumes, or why it failed."""

    state: str
    detail: str = ""


def caused_by_interrupt(error: BaseException) -> BaseException | None:
    """The KeyboardInterrupt or Terminated among an error's causes, or a SystemExit (submitit's); else None."""
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

    The status is `running`, then `done`, `failed` or `interrupted`. Only the first process of a DDP job writes. `check`
    is called before `work`; the state that it returns is kept as status.json's "before".

    Raises:
        UserError: the run's folder cannot be written from the start.
        TrainingError: the job is done, but its result could not be written.
        Whatever `work` and `check` raise; KeyboardInterrupt or Terminated for an interrupted job.
    """
    if not run.rank_zero:
        if check is not None:
            check()
        return work()
    status = _first_status(run)

    def write_status(state: str, error: str | None = None) -> None:
        status.update(status=state, error=error, ended=None if state == "running" else now())
        write_json(run.directory / STATUS, status)

    def write_failure(error: BaseException, interrupt: BaseException | None = None) -> None:
        with held(), contextlib.suppress(OSError):  # must not hide the error itself
            with open(run.directory / "run.log", "a", encoding="utf-8") as file:
                trace = [f"interrupted: {describe(interrupt)}\n"] if interrupt else traceback.format_exception(error)
                file.writelines(trace)
            write_status("interrupted" if interrupt else "failed", describe(interrupt or error))

    try:
        try:
            with held():
                run.directory.mkdir(parents=True, exist_ok=True)
                _write_config(run)
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
        stored = f"{result['artifact']} is stored" if is_artifact else "the job is done"
        fault = TrainingError(
            f"{stored}, but {run.directory} cannot be written any more ({error.strerror or error})\n"
            "Free some space there, or set hydra.run.dir=DIR, and run the same command again to write result.json"
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


def _write_config(run: Run) -> None:
    import yaml

    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    (run.directory / CONFIG).write_text(text, encoding="utf-8")

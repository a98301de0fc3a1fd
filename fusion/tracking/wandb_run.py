"""Start a W&B run: online if there is a key and a server, offline otherwise.

W&B can fail in four ways: no key (an immediate error), an unreachable server (an error after a long wait), a call
that raises during training, and a `finish` that waits for a lost server. Each becomes one line on the console:
training continues, offline if possible, without W&B if not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fusion.config.training import WandbConfig
from fusion.errors import first_line
from fusion.files import read_json, write_json
from fusion.text import shortened

log = logging.getLogger(__name__)

# Upper bounds of what a lost server may cost a job, beside `logger.wandb.init_timeout`.
LINK_SECONDS = 15.0  # for W&B's artifacts; the run's config names them anyway
FINISH_SECONDS = 20.0  # for the rest of the upload when a job ends; `wandb sync` can upload it later
SERVICE_SECONDS = 8.0  # for the start of W&B's service process once something has failed
STEP = "trainer/global_step"  # Lightning's name
ID_FILE = "wandb.json"


@dataclass
class State:
    """What the jobs of one command share; parallel jobs in other processes decide for themselves."""

    reason: str | None = None  # why later runs are offline
    noticed: bool = False
    sweep: Path | None = None  # the folder that a single notice names

    def reset(self) -> None:
        """For a new command."""
        self.reason, self.noticed, self.sweep = None, False, None

    def first_notice(self) -> bool:
        first, self.noticed = not self.noticed, self.sweep is not None
        return first


state = State()


def run_id(folder: Path | None, identity: str) -> str | None:
    """The id of a run: the same for every resume, a new one, with `identity` as prefix, once the run starts over.

    It is kept in `folder`, with the run's checkpoints, which are removed when the run is done or starts over. None,
    without a folder: W&B chooses one. An agent of a W&B sweep assigns the id itself.
    """
    if os.environ.get("WANDB_SWEEP_ID") and (assigned := os.environ.get("WANDB_RUN_ID")):
        return assigned
    if folder is None:
        return None
    known = read_json(folder / ID_FILE).get("id")
    if isinstance(known, str) and re.fullmatch(r"[\w.-]{1,64}", known):
        return known
    new = f"{identity}-{secrets.token_hex(3)}"
    with contextlib.suppress(OSError):  # a full disk is reported by the checkpoints
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / ID_FILE, {"id": new})
    return new


def start_run(config: WandbConfig, /, **labels: Any) -> Any | None:
    """A running W&B run; None, with a notice, if W&B is disabled or cannot start. `labels`: of `wandb.init`."""
    try:
        import wandb

        disable_error_reports()
        Path(labels["dir"]).mkdir(parents=True, exist_ok=True)  # W&B would use a temporary folder otherwise
        state.reason = _drop_malformed_variables() or state.reason
        settings = wandb.Settings(silent=True)
        if state.reason is not None:
            settings.x_service_wait = SERVICE_SECONDS
        mode = config.mode or os.environ.get("WANDB_MODE") or wandb.setup(settings).settings.mode
        if mode == "disabled":
            if state.first_notice():
                log.info("W&B is disabled; nothing is tracked there")
            return None
        reason = "as requested"
        if mode not in ("offline", "dryrun"):  # dryrun: W&B's former name of offline
            state.reason = state.reason or missing_key()
            if state.reason is None:
                try:
                    run = _init(config, "online", labels)
                    log.info("W&B: %s", run.url)
                    return run
                except Exception as error:
                    state.reason = reason_of(error)
            reason = state.reason
        try:
            run = _init(config, "offline", labels)
        except Exception:
            # W&B's service may have died in an earlier job of the sweep, or still hold the id of the rejected run.
            with contextlib.suppress(Exception):
                wandb.teardown()
            run = _init(config, "offline", labels)
        report_offline(reason, Path(labels["dir"]))
        return run
    except Exception as error:
        state.reason = f"W&B could not start: {reason_of(error)}"
        if state.first_notice():
            log.warning("W&B could not start (%s); training continues without it", reason_of(error))
        return None


def _init(config: WandbConfig, mode: Literal["online", "offline"], labels: dict[str, Any]) -> Any:
    """Start a run. The mode is a setting: WANDB_MODE would leak into the next job of a sweep."""
    import wandb

    settings = wandb.Settings(
        silent=True,
        init_timeout=config.init_timeout,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
        reinit="finish_previous",  # an open run of a failed job must not take this job's metrics
    )
    folder = Path(labels["dir"]) / "wandb"
    before = set(folder.glob("*run-*"))
    try:
        run = wandb.init(mode=mode, settings=settings, project=config.project, entity=config.entity, **labels)
    except Exception:
        for started in set(folder.glob("*run-*")) - before:
            shutil.rmtree(started, ignore_errors=True)
        raise
    # Lightning defines these only for runs that it starts itself.
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    return run


def report_offline(reason: str, folder: Path) -> None:
    """One line for all jobs of a sweep, with the command that uploads their runs."""
    if state.first_notice():
        what, folder = ("run", folder) if state.sweep is None else ("runs of this sweep", state.sweep)
        command = f"python -m fusion.sync {shlex.quote(f'runs={relative(folder)}')}"
        log.info("W&B is offline (%s); upload the %s later with `%s`", reason, what, command)


def missing_key() -> str | None:
    """What is wrong with the API key, without asking the user or the server for one; None if it is set."""
    import wandb

    try:
        set_ = wandb.login(prompt=False, verify=False)
    except Exception as error:
        return reason_of(error)
    return None if set_ else "no API key is set; `wandb login` sets one"


def disable_error_reports() -> None:
    """W&B reports its own errors to the same server: if that is lost, the process would not exit for 30 s.

    W&B 0.31 even deadlocks when its service cannot start: the report needs a lock that it holds.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    with contextlib.suppress(Exception):
        from wandb.analytics.opentelemetry import opentelemetry_proxy

        opentelemetry_proxy.disable()


def _drop_malformed_variables() -> str | None:
    """Remove environment variables that W&B rejects: it could not even start offline with them."""
    import wandb

    problem = None
    for variable, field in (("WANDB_BASE_URL", "base_url"), ("WANDB_MODE", "mode")):
        if (value := os.environ.get(variable)) is not None:
            try:
                wandb.Settings(**dict[str, Any]({field: value}))
            except Exception as error:
                del os.environ[variable]
                problem = f"{variable}={shortened(value, 200)}: {reason_of(error)}"
    return problem


def relative(path: str | Path) -> Path:
    """The path relative to the working directory if it is inside."""
    here = Path.cwd()
    return Path(path).relative_to(here) if Path(path).is_relative_to(here) else Path(path)


def reason_of(error: BaseException) -> str:
    """One line about an error of W&B's."""
    if str(error).strip() == "<no message>":  # W&B's text for a rejected run, as with a wrong key
        return "the server rejected the run without a reason; check the API key"
    if "validation error" in str(error) and callable(errors := getattr(error, "errors", None)):  # pydantic
        return "; ".join(str(fault["msg"]) for fault in errors()[:2])
    return first_line(error)

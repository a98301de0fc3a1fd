"""Start a W&B run: online if there is an API key and a server, offline otherwise.

A missing key, an unreachable server, an error during training or a lost connection in `finish` is reported in one
line. Training continues, offline if possible, otherwise without W&B.
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

# Timeouts if the server is lost, in addition to `logger.wandb.init_timeout`.
LINK_SECONDS = 15.0  # linking artifacts
FINISH_SECONDS = 20.0  # remaining upload when a job finishes; `wandb sync` can upload the rest later
SERVICE_SECONDS = 8.0  # start of W&B's service process after a failure
STEP = "trainer/global_step"  # Lightning's name
ID_FILE = "wandb.json"


@dataclass
class State:
    """W&B state shared by the jobs of one command in this process."""

    reason: str | None = None  # why later runs are offline
    noticed: bool = False
    sweep: Path | None = None  # directory of the sweep; reported once for all jobs

    def reset(self) -> None:
        self.reason, self.noticed, self.sweep = None, False, None

    def first_notice(self) -> bool:
        first, self.noticed = not self.noticed, self.sweep is not None
        return first


state = State()


def run_id(folder: Path | None, identity: str) -> str | None:
    """Return the id of a run, which is the same when it resumes and has `identity` as its prefix.

    It is stored in `folder` with the checkpoints, which are removed when the run is done or starts over. Returns None if
    W&B chooses the id. An agent of a W&B sweep assigns it.
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
    """Start a W&B run with `labels`, arguments of `wandb.init`. Returns None if W&B is disabled or cannot start."""
    try:
        import wandb

        disable_error_reports()
        Path(labels["dir"]).mkdir(parents=True, exist_ok=True)  # W&B would use a temporary directory otherwise
        state.reason = _drop_malformed_variables() or state.reason
        general = wandb.Settings(silent=True)
        if state.reason is not None:
            general.x_service_wait = SERVICE_SECONDS
        mode = config.mode or os.environ.get("WANDB_MODE") or wandb.setup(general).settings.mode
        if mode == "disabled":
            if state.first_notice():
                log.info("W&B is disabled; nothing is logged to W&B")
            return None
        reason = "as requested"
        if mode not in ("offline", "dryrun"):  # dryrun: former name of offline
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
            # W&B's service may have exited in an earlier job, or still use the id of the rejected run.
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
    """Start a run. The mode is an argument, since WANDB_MODE would affect the next job of a sweep."""
    import wandb

    given = labels | {"mode": mode, "project": config.project, "entity": config.entity}
    folder = Path(labels["dir"]) / "wandb"
    before = set(folder.glob("*run-*"))
    try:  # "finish_previous" finishes the run of a failed job
        run = wandb.init(settings=settings(config.init_timeout, reinit="finish_previous"), **given)
    except Exception:
        for started in set(folder.glob("*run-*")) - before:
            shutil.rmtree(started, ignore_errors=True)
        raise
    # Lightning only defines these metrics for runs that it starts.
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    # One curve per slot would come before loss and scores; `attention/picture` and `attention/table` show the values.
    for name in ("entropy", "value_distance"):
        run.define_metric(f"attention/{name}/*", step_metric=STEP, step_sync=True, hidden=True)
    return run


def settings(init_timeout: float, **more: Any) -> Any:
    """Return W&B's settings for a run, with limited waiting times."""
    import wandb

    limits: dict[str, Any] = {
        "init_timeout": init_timeout,
        "finish_timeout": FINISH_SECONDS,
        "finish_timeout_raises": True,
    }
    return wandb.Settings(silent=True, **limits, **more)


def report_offline(reason: str, folder: Path) -> None:
    """Log the command that uploads the run, once for all jobs of a sweep."""
    if state.first_notice():
        what, folder = ("run", folder) if state.sweep is None else ("runs of this sweep", state.sweep)
        command = f"python -m fusion.sync {shlex.quote(f'runs={relative(folder)}')}"
        log.info("W&B is offline (%s); upload the %s later with `%s`", reason, what, command)


def missing_key() -> str | None:
    """Return the problem with the API key, or None if it is set. Does not prompt or contact the server."""
    import wandb

    try:
        set_ = wandb.login(prompt=False, verify=False)
    except Exception as error:
        return reason_of(error)
    return None if set_ else "no API key is set; `wandb login` sets one"


def disable_error_reports() -> None:
    """Disable error reports to W&B, which delay the exit by 30 s if the connection is lost.

    W&B 0.31 even deadlocks when its service cannot start, since the report waits for a lock that it holds itself.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    with contextlib.suppress(Exception):
        from wandb.analytics.opentelemetry import opentelemetry_proxy

        opentelemetry_proxy.disable()


def _drop_malformed_variables() -> str | None:
    """Remove environment variables that W&B rejects, even in offline mode. Returns the problem, if any."""
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
    """Return the path relative to the working directory if it is inside."""
    here = Path.cwd()
    return Path(path).relative_to(here) if Path(path).is_relative_to(here) else Path(path)


def reason_of(error: BaseException) -> str:
    """Return one line about an error of W&B."""
    if str(error).strip() == "<no message>":  # for a rejected run, e.g. with an invalid key
        return "the server rejected the run without a reason; check the API key"
    if "validation error" in str(error) and callable(errors := getattr(error, "errors", None)):  # pydantic
        return "; ".join(str(fault["msg"]) for fault in errors()[:2])
    # The cause of a timeout is in the second line.
    return " ".join([first_line(error), *(line for line in str(error).splitlines()[1:] if "while retrying" in line)])

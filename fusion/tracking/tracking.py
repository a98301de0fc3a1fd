"""The loggers of a run: W&B and CSV. None of them may stop a training run, or make it wait for long.

W&B has four ways to spoil a run: no key (an error at once), a server out of reach (an error after a long
wait), a call that raises in mid-training, and a `finish` that waits for a server that is gone. Here each ends
in one line on the console and a run that goes on: offline where it can, without W&B where it cannot.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import logging
import math
import os
import re
import shlex
import shutil
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger

from fusion.config.logger import WANDB_MODES, CsvConfig, LoggerConfig, WandbConfig
from fusion.errors import first_line
from fusion.text import shortened
from fusion.tracking.decision import is_first_notice, offline_reason, remember_offline, sweep_folder
from fusion.tracking.labels import best_is, flat
from fusion.tracking.lineage import Links, describe, link, links_file
from fusion.tracking.run_id import run_id

log = logging.getLogger(__name__)
T = TypeVar("T")

# Together, what a server that stops answering may cost a job and the next one of its sweep.
FINISH_SECONDS = 20.0  # for what is not yet uploaded when a job ends; `wandb sync` sends the rest later
PROBE_SECONDS = 5.0  # for a first answer of the server, before W&B itself asks and asks again
LINK_SECONDS = 15.0  # for W&B's own lineage, which the run's config states anyway
SERVICE_SECONDS = 8.0  # for W&B's own service, once the server has failed
OTHER_MODES = ("dryrun", "run", "shared")  # further values that W&B itself takes
STEP = "trainer/global_step"  # as Lightning calls it
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")


class _NeverRaises:
    """Stands before a Lightning logger: its errors become one warning, and the run goes on."""

    _warned = False

    def _attempt(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:
            if not self._warned:
                log.warning(
                    "%s could not log (%s); training goes on, further errors of it are not shown",
                    "W&B" if isinstance(self, WandbLogger) else "the CSV logger",
                    _reason(error),
                )
            self._warned = True

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._attempt(super().log_metrics, metrics, step)  # type: ignore[misc]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self._attempt(super().log_hyperparams, *args, **kwargs)  # type: ignore[misc]

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        self._attempt(super().log_graph, *args, **kwargs)  # type: ignore[misc]

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self._attempt(super().after_save_checkpoint, checkpoint_callback)  # type: ignore[misc]

    def save(self) -> None:
        self._attempt(super().save)  # type: ignore[misc]

    def finalize(self, status: str) -> None:
        self._attempt(super().finalize, status)  # type: ignore[misc]


class SafeWandbLogger(_NeverRaises, WandbLogger):
    """Lightning's W&B logger around a run that was started here.

    W&B's own step is the training's, so that what is logged at one step is one row, and what a run that is taken up
    again goes through twice (it gives the same numbers) does not stand there twice. Epochs count from 1.
    """

    _defined: frozenset[str] = frozenset()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._attempt(self._log, metrics, step)

    def _log(self, metrics: Mapping[str, Any], step: int | None) -> None:
        run, values = self.experiment, dict(metrics)
        if "epoch" in values:
            values["epoch"] = int(values["epoch"]) + 1
        for name in values.keys() - self._defined:
            # The summary keeps the best of a curve.
            if (best := best_is(name)) is not None:
                run.define_metric(name, step_metric=STEP, step_sync=True, summary=best)
        self._defined |= values.keys()
        if step is None:
            run.log(values)
        else:
            run.log({**values, STEP: step}, step=step)


class SafeCsvLogger(_NeverRaises, CSVLogger):
    """Lightning's CSV logger."""


def build_loggers(
    config: LoggerConfig,
    *,
    directory: Path,
    name: str,
    group: str,
    job_type: str,
    tags: list[str],
    config_values: dict[str, Any],
    checkpoints: Path | None = None,
    identity: str = "",
) -> list[Logger]:
    """The loggers that `logger=` asks for, none in any process but the first of a DDP run.

    Args:
        directory: the job's output directory; W&B writes to DIRECTORY/wandb, CSV to DIRECTORY/csv/metrics.csv.
        name, group, job_type, tags: how the W&B run is labelled.
        config_values: the resolved config, shown with the run: `optim/lr`, `task/name` and so on.
        checkpoints: where a W&B run's id is kept, for a run that is taken up again; None: each has a new one.
        identity: what such an id begins with.
    """
    if any(os.environ.get(variable, "0") not in ("", "0") for variable in RANK_VARIABLES):
        return []
    loggers: list[Logger] = []
    if config.wandb is not None:
        run = _start_run(
            config.wandb,
            dir=str(directory),
            name=name,
            group=group,
            job_type=job_type,
            tags=_tags(tags),
            config=_columns(config_values),
            id=run_id(checkpoints, identity),
            resume="allow",
        )
        if run is not None:
            loggers.append(
                SafeWandbLogger(experiment=run, project=config.wandb.project, save_dir=str(directory))
            )
    if config.csv is not None:
        loggers.append(_csv_logger(config.csv, directory))
    return loggers


def log_result(loggers: Sequence[Logger], result: Mapping[str, Any]) -> None:
    """Puts a run's result beside its curves: metrics, artifact, sources, parameters and speed.

    In W&B these are the run's summary: `best/validation/accuracy` and `best/epoch` of a training (its curves have
    their own `validation/accuracy.max`), `validation/accuracy` of an evaluation; `epochs`, `speed/seconds`,
    `speed/tokens_per_second`, `speed/peak_memory_bytes`, `parameters/trainable`, `parameters/stored_bytes`, ...
    """
    for run in _runs(loggers):
        _quietly("show the result", _log_result, run, result)


def log_attention(loggers: Sequence[Logger], record: Mapping[str, Any]) -> None:
    """Shows a line of attention.jsonl in W&B: a picture, a table, and each slot's figures as curves."""
    for run in _runs(loggers):
        _quietly("show the attention", _log_attention, run, record)


def run_reference(loggers: Sequence[Logger]) -> dict[str, Any] | None:
    """Where the job's W&B run is found, `{"id", "project", "entity", "url"}`; None where it has none."""
    for run in _runs(loggers):
        with contextlib.suppress(Exception):
            return {
                "id": run.id,
                "project": run.project,
                "entity": run.entity or None,
                "url": None if run.offline else run.url,
            }
    return None


def log_lineage(
    loggers: Sequence[Logger],
    *,
    folder: Path,
    kind: str,
    name: str,
    hash: str,
    sources: Sequence[Mapping[str, Any]],
    init_from: Mapping[str, Any] | None = None,
) -> None:
    """Says which artifact a run made (STORE/NAME) and, of a fusion, out of which sources.

    The run's config says so always, with the sources' own runs. A run that is online also gets W&B's artifacts, with
    the first twelve digits of the hash as their alias; of another, `python -m fusion.sync` draws them later.

    Args:
        sources: `{"name", "hash", "run"}` each, the last of them a `run_reference` where it is known.
        init_from: the artifact whose weights the training started from, in the same form.
    """
    used = [dict(source) | {"run": _reference(source.get("run"))} for source in sources]
    stated: dict[str, Any] = {"name": name, "hash": hash, "kind": kind}
    stated["sources"] = [_source(source) for source in used]
    if init_from is not None:
        used.append(dict(init_from) | {"run": _reference(init_from.get("run"))})
        stated["init_from"] = _source(used[-1])
    made = {"name": name, "hash": hash, "kind": kind, "folder": str(folder.absolute())}
    _state(loggers, stated, made, used)


def log_use(
    loggers: Sequence[Logger], *, kind: str, name: str, hash: str, run: Mapping[str, Any] | None
) -> None:
    """Says which artifact a run evaluates, as `log_lineage` says what one makes."""
    used = {"name": name, "hash": hash, "run": _reference(run)}
    _state(loggers, _source(used) | {"kind": kind}, None, [used])


def _reference(run: Any) -> dict[str, Any] | None:
    """A `run_reference` as a manifest has it, who may have written anything there."""
    return dict(run) if isinstance(run, Mapping) and isinstance(run.get("id"), str) else None


def _source(source: Mapping[str, Any]) -> dict[str, Any]:
    """As a run's config states it: by hash, and by run id where that is known."""
    run = source.get("run")
    return {"name": source["name"], "hash": source["hash"], **({"run": run["id"]} if run else {})}


def _state(
    loggers: Sequence[Logger],
    stated: dict[str, Any],
    made: dict[str, Any] | None,
    used: list[dict[str, Any]],
) -> None:
    for run in _runs(loggers):
        _quietly("show the artifact", run.config.update, {"artifact": _plain(stated)}, allow_val_change=True)
        _quietly("link the artifacts", _keep_links, run, Links(describe(run), made, used))


def _keep_links(run: Any, links: Links) -> None:
    """Draws the links of a run that is online, and notes what `python -m fusion.sync` has to draw."""
    file = links_file(run)
    links.write(file)
    if not run.offline:
        _within(LINK_SECONDS, functools.partial(_link_artifacts, run, links)).write(file)


def finish(loggers: Sequence[Logger], exit_code: int = 0) -> None:
    """Ends the runs of a job, in bounded time and without raising. The next job of a sweep starts its own."""
    for logger in loggers:
        logger.finalize("success" if exit_code == 0 else "failed")
    for run in _runs(loggers):
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            remember_offline(f"the server was lost: {_reason(error)}")
            log.warning(
                "W&B could not upload all of the run (%s): `wandb sync %s` uploads it later",
                _reason(error),
                _shown(run.settings.sync_dir),
            )


def _csv_logger(config: CsvConfig, directory: Path) -> Logger:
    return SafeCsvLogger(
        save_dir=str(directory), name="csv", version="", flush_logs_every_n_steps=config.flush_every_n_steps
    )


def _start_run(config: WandbConfig, /, **labels: Any) -> Any | None:
    """A running W&B run, or None with a warning that says why there is none."""
    # W&B reports its own errors to the same server; when that is gone, the process would not end for 30 s.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb

        no_telemetry()
        directory = Path(labels["dir"])
        directory.mkdir(parents=True, exist_ok=True)  # W&B would write to a temporary folder instead
        if (problem := _malformed()) is not None:
            remember_offline(problem)
        mode = _mode(config.mode or os.environ.get("WANDB_MODE") or wandb.setup(_quiet()).settings.mode)
        if mode == "disabled":
            if is_first_notice():
                log.info("W&B is disabled, nothing is tracked there")
            return None
        reason = "asked for" if mode == "offline" else offline_reason() or why_offline(config) or no_answer()
        if reason is None:
            before = set(directory.glob("wandb/run-*"))
            try:
                return _init(config, "online", **labels)
            except Exception as error:
                reason = f"the server did not take the run: {_reason(error)}"
            for started in set(directory.glob("wandb/run-*")) - before:
                shutil.rmtree(started, ignore_errors=True)
        if mode != "offline":
            remember_offline(reason)
        before = set(directory.glob("wandb/offline-run-*"))
        try:
            return _init(config, "offline", reason, **labels)
        except Exception:
            # Its service may have died in an earlier job of the sweep, or still hold the id of a run that the server
            # did not take; a new one starts now.
            with contextlib.suppress(Exception):
                wandb.teardown()
            for started in set(directory.glob("wandb/offline-run-*")) - before:
                shutil.rmtree(started, ignore_errors=True)
            return _init(config, "offline", reason, **labels)
    except Exception as error:
        remember_offline(f"W&B could not start: {_reason(error)}")
        if is_first_notice():
            log.warning("W&B could not start (%s); the run goes on without it", _reason(error))
        return None


def _malformed() -> str | None:
    """What is wrong with W&B's environment variables, which are dropped then: W&B itself could not even start."""
    problem = None
    if "WANDB_BASE_URL" in os.environ and (why := _url_problem(url := os.environ["WANDB_BASE_URL"])):
        del os.environ["WANDB_BASE_URL"]
        problem = f"WANDB_BASE_URL={shortened(url, 200)}: {why}; expected such as https://api.wandb.ai"
    if (mode := os.environ.get("WANDB_MODE")) and mode not in (*WANDB_MODES, *OTHER_MODES):
        del os.environ["WANDB_MODE"]
        problem = f"WANDB_MODE={shortened(mode, 200)}: expected {', '.join(WANDB_MODES)}"
    return problem


def _url_problem(text: str) -> str | None:
    try:
        url = urlsplit(text.strip())
        port = url.port
    except ValueError as error:
        return str(error)
    if url.scheme not in ("http", "https"):
        return "it has no http:// or https://"
    if not url.hostname or re.search(r"\s", text) or port == 0:
        return "it is no URL of a server"
    return None


def no_answer() -> str | None:
    """Why the server that can be reached is no use: it is silent, fails, or refuses the key. At most PROBE_SECONDS.

    None: it answers, or a proxy or a certificate decides that, which W&B handles itself.
    """
    import wandb

    settings = wandb.setup(_quiet()).settings
    return None if _behind_proxy(settings) else _no_answer(settings)


def _no_answer(settings: Any) -> str | None:
    url = settings.base_url.rstrip("/")
    key = os.environ.get("WANDB_API_KEY") or settings.api_key or ""
    request = urllib.request.Request(
        f"{url}/graphql",
        data=json.dumps({"query": "query Viewer { viewer { id } }", "variables": {}}).encode(),
        headers={
            "content-type": "application/json",
            "authorization": f"Basic {base64.b64encode(f'api:{key}'.encode()).decode()}",
        },
    )
    host = urlsplit(url).hostname

    def ask() -> str | None:
        try:
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS) as answer:
                answer.read(2**16)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                return f"{host} refused the API key ({error.code}); `wandb login` sets one"
            return f"{host} answers with error {error.code}" if error.code >= 500 else None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLError):
                return None
            raise
        return None

    try:
        return _within(PROBE_SECONDS, ask)
    except TimeoutError:
        return f"{host} does not answer within {PROBE_SECONDS:g} s"
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(getattr(error, "reason", None), TimeoutError):
            return f"{host} does not answer within {PROBE_SECONDS:g} s"
        return f"{host} does not answer: {first_line(error)}"


def _mode(mode: str) -> str:
    """`dryrun` is W&B's old word for offline; whatever else is not offline or disabled wants a server."""
    return {"dryrun": "offline", "offline": "offline", "disabled": "disabled"}.get(mode, "online")


def no_telemetry() -> None:
    """W&B 0.31 reports that its service cannot start while it holds the lock that the report needs: for ever."""
    with contextlib.suppress(Exception):
        from wandb.analytics.opentelemetry import opentelemetry_proxy

        opentelemetry_proxy.disable()


def _quiet() -> Any:
    import wandb

    settings = wandb.Settings(silent=True)
    if offline_reason() is not None:
        settings.x_service_wait = SERVICE_SECONDS
    return settings


def why_offline(config: WandbConfig) -> str | None:
    """Why the run cannot be online, found out before W&B tries: it would ask for a key, or wait."""
    import wandb

    settings = wandb.setup(_quiet()).settings
    try:
        if not wandb.login(prompt=False, verify=False):
            return "no API key is set, `wandb login` sets one"
    except Exception as error:  # a key that is no key, two kinds of keys at once
        return _reason(error)
    return _out_of_reach(settings, min(PROBE_SECONDS, config.init_timeout))


def _out_of_reach(settings: Any, timeout: float) -> str | None:
    """Why no connection to the W&B server can be made, or None if one can, or if a proxy decides that."""
    url = urlsplit(settings.base_url)
    if _behind_proxy(settings) or url.hostname is None:
        return None
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname, port), timeout=timeout).close()
    except OSError as error:
        return f"{url.hostname} is out of reach: {error.strerror or _reason(error)}"
    return None


def _behind_proxy(settings: Any) -> bool:
    return bool(
        settings.http_proxy
        or settings.https_proxy
        or {"http", "https", "all"} & {*urllib.request.getproxies()}
    )


def _init(
    config: WandbConfig, mode: Literal["online", "offline"], reason: str | None = None, /, **labels: Any
) -> Any:
    """Starts a run. The mode goes in as a setting: WANDB_MODE would stay for the next job of a sweep."""
    import wandb

    settings = wandb.Settings(
        silent=True,
        init_timeout=config.init_timeout,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
        reinit="finish_previous",  # a run that a failed job left open must not take this job's metrics
    )
    run = wandb.init(project=config.project, entity=config.entity, mode=mode, settings=settings, **labels)
    # Lightning does this only for runs that it starts itself.
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    if mode == "online":
        log.info("W&B: %s", run.url)
    else:
        _report_offline(reason, Path(run.settings.sync_dir).parents[1])  # two above: RUN/wandb/offline-run-…
    return run


def _report_offline(reason: str | None, folder: Path) -> None:
    """One line for all jobs of a sweep, which one command uploads."""
    if not is_first_notice():
        return
    sweep = sweep_folder()
    log.info(
        "W&B is offline (%s): `python -m fusion.sync %s` uploads the %s later",
        reason,
        shlex.quote(f"runs={_shown(str(sweep or folder))}"),
        "runs of this sweep" if sweep else "run",
    )


def _runs(loggers: Sequence[Logger]) -> Iterator[Any]:
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            yield logger._experiment


def _quietly(what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        call(*args, **kwargs)
    except Exception as error:
        log.warning("W&B could not %s (%s); the run goes on", what, _reason(error))


def _log_result(run: Any, result: Mapping[str, Any]) -> None:
    values = _plain(result)
    scores = dict(flat(values.pop("metrics", None) or {}))
    if "best_epoch" in values:  # of a training: each score has a curve already
        scores = {f"best/{name}": score for name, score in scores.items()}
        scores["best/epoch"] = values["best_epoch"]
    run.summary.update(dict(flat(values)) | scores)


def _log_attention(run: Any, record: Mapping[str, Any]) -> None:
    import wandb

    from fusion.tracking.attention_picture import COLUMNS, picture, rows

    values: dict[str, Any] = {"epoch": record["epoch"], STEP: record["step"]}
    for figure in ("entropy", "value_distance"):
        for slot, of_slot in record["slots"].items():
            if of_slot[figure] is not None:
                values[f"attention/{figure}/{slot}"] = of_slot[figure]
    values["attention/picture"] = wandb.Image(picture(record), file_type="png")
    values["attention/table"] = wandb.Table(columns=list(COLUMNS), data=rows(record))
    with _staged_in(Path(run.settings.sync_dir)):
        run.log(values, step=record["step"])


@contextlib.contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """A wandb.Table is an artifact too, and offline its file stays where W&B staged it: here, and not at home."""
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]
        else:
            os.environ["WANDB_DATA_DIR"] = before


def _link_artifacts(run: Any, links: Links) -> Links:
    # Each question to a server that went away takes W&B some twenty seconds: ask first.
    if (problem := _out_of_reach(run.settings, PROBE_SECONDS)) is not None:
        remember_offline(problem)
        raise ConnectionError(problem)
    return link(run, links)


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Does what cannot be told how long to wait, in a thread that is left behind when it takes too long.

    Returns:
        What `work` gives.

    Raises:
        TimeoutError: it does. Else whatever `work` raises.
    """
    raised: list[Exception] = []
    given: list[T] = []

    def call() -> None:
        try:
            given.append(work())
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True, name="wandb-link")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"the server is slow, and {seconds:g} s are over")
    if raised:
        raise raised[0]
    return given[0]


def _shown(path: str) -> str:
    folder = Path(path)
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def _columns(config_values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(flat(_plain(config_values)))


def _tags(tags: list[str]) -> list[str]:
    """W&B refuses a run with an empty tag or one of more than 64 characters."""
    return list(dict.fromkeys(tag[:64] for tag in tags if tag))


def _plain(value: Any) -> Any:
    """Plain containers, which W&B can show: what it does not know becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _reason(error: BaseException) -> str:
    if str(error).strip() == "<no message>":  # W&B's words where a server refuses, as it does for a wrong key
        return "it gave no reason; is the API key right?"
    if "validation error" in str(error) and callable(errors := getattr(error, "errors", None)):  # pydantic's
        return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in errors()[:2])
    return first_line(error)

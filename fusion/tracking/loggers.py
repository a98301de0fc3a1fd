"""The loggers of a run, W&B and CSV. An error of a logger is reported once and never stops training."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger

from fusion.config.training import LoggerConfig
from fusion.tracking.labels import best_is, flat, plain
from fusion.tracking.run_id import run_id
from fusion.tracking.wandb_run import STEP, reason_of, relative, start_run, state

log = logging.getLogger(__name__)
L = TypeVar("L", bound=type[Logger])

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
GUARDED = ("log_metrics", "log_hyperparams", "log_graph", "after_save_checkpoint", "save", "finalize")
MAX_TAG_LENGTH = 64  # W&B rejects a run with a longer or an empty tag


def never_raises(logger: L) -> L:
    """Class decorator: an error in one of the `GUARDED` methods becomes one warning per logger."""

    def guarded(method: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(method)
        def attempt(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                method(self, *args, **kwargs)
            except Exception as error:
                if not getattr(self, "_warned", False):
                    text = "the %s logger failed (%s); training continues, further errors are hidden"
                    log.warning(text, "W&B" if isinstance(self, WandbLogger) else "CSV", reason_of(error))
                self._warned = True

        return attempt

    for name in GUARDED:
        setattr(logger, name, guarded(getattr(logger, name)))
    return logger


@never_raises
class SafeWandbLogger(WandbLogger):
    """Lightning's W&B logger around a run that `start_run` started.

    W&B's own step is the training step: metrics of one step are one row, and the steps that a resumed run repeats
    (with the same numbers) are not logged twice. Epochs count from 1.
    """

    _defined: frozenset[str] = frozenset()

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        run, values = self.experiment, dict(metrics)
        if "epoch" in values:
            values["epoch"] = int(values["epoch"]) + 1
        for name in values.keys() - self._defined:
            if (best := best_is(name)) is not None:  # the summary keeps the best value of a curve
                run.define_metric(name, step_metric=STEP, step_sync=True, summary=best)
        self._defined |= values.keys()
        run.log(values if step is None else {**values, STEP: step}, step=step)


@never_raises
class SafeCsvLogger(CSVLogger):
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
    """The loggers that `logger=` selects; none in any process but the first of a DDP run.

    Args:
        directory: the job's output directory; W&B writes to DIRECTORY/wandb, CSV to DIRECTORY/csv/metrics.csv.
        name, group, job_type, tags: labels of the W&B run.
        config_values: the resolved config, logged as `optim/lr`, `task/name` and so on.
        checkpoints: where the id of a resumable W&B run is kept; None: every start has a new id.
        identity: prefix of that id.
    """
    if any(os.environ.get(variable, "0") not in ("", "0") for variable in RANK_VARIABLES):
        return []
    loggers: list[Logger] = []
    if config.wandb is not None:
        run = start_run(
            config.wandb,
            dir=str(directory),
            name=name,
            group=group,
            job_type=job_type,
            tags=list(dict.fromkeys(tag[:MAX_TAG_LENGTH] for tag in tags if tag)),
            config=dict(flat(plain(config_values))),
            id=run_id(checkpoints, identity),
            resume="allow",
        )
        if run is not None:
            project = config.wandb.project
            loggers.append(SafeWandbLogger(experiment=run, project=project, save_dir=str(directory)))
    if config.csv is not None:
        every = config.csv.flush_every_n_steps
        loggers.append(SafeCsvLogger(str(directory), name="csv", version="", flush_logs_every_n_steps=every))
    return loggers


def wandb_run(loggers: Sequence[Logger]) -> Any | None:
    """The W&B run among the loggers, or None."""
    return next((one._experiment for one in loggers if isinstance(one, WandbLogger)), None)


def finish(loggers: Sequence[Logger], exit_code: int = 0) -> None:
    """End the run of a job, in bounded time and without raising. The next job of a sweep starts its own."""
    for logger in loggers:
        logger.finalize("success" if exit_code == 0 else "failed")
    if (run := wandb_run(loggers)) is not None:
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            state.reason = f"the connection was lost: {reason_of(error)}"
            text = "W&B could not upload all of the run (%s); upload it later with `wandb sync %s`"
            log.warning(text, reason_of(error), relative(run.settings.sync_dir))

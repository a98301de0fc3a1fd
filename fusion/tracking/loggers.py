"""W&B and CSV loggers of a run, and the values they log. Errors are reported once and never stop training."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger

from fusion.config.methods import ADAPTER
from fusion.config.stages import StageConfig
from fusion.config.training import LoggerConfig
from fusion.files import write_json
from fusion.runs.run import Run
from fusion.store.manifest import Manifest
from fusion.tasks.table import METRICS
from fusion.text import flat
from fusion.tracking.offline import FILE, link, staged_in
from fusion.tracking.wandb_run import LINK_SECONDS, STEP, reason_of, relative, run_id, start_run, state

log = logging.getLogger(__name__)
L = TypeVar("L", bound=type[Logger])

GUARDED = ("log_metrics", "log_hyperparams", "log_graph", "after_save_checkpoint", "save", "finalize")
MAX_TAG_LENGTH = 64  # W&B rejects a run with a longer or an empty tag
NAMES_SHOWN = 4  # maximum number of sources in a name
LENGTH = 128  # W&B's limit for a name
SCORES = {*(metric for metrics in METRICS.values() for metric in metrics), "mean"}


def never_raises(logger: L) -> L:
    """Class decorator that turns errors in the `GUARDED` methods into one warning per logger."""

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
    """Lightning's W&B logger for a run started by `start_run`.

    The W&B step is the training step: metrics of one step form one row, and steps that a resumed run repeats (with the
    same values) are not logged twice. Epochs count from 1.
    """

    _defined: frozenset[str] = frozenset()

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        run, values = self.experiment, dict(metrics)
        if "epoch" in values:
            values["epoch"] = int(values["epoch"]) + 1
        for name in values.keys() - self._defined:
            if (best := best_is(name)) is not None:  # the summary contains the best value of a curve
                run.define_metric(name, step_metric=STEP, step_sync=True, summary=best)
        self._defined |= values.keys()
        run.log(values if step is None else {**values, STEP: step}, step=step)


@never_raises
class SafeCsvLogger(CSVLogger):
    """Lightning's CSV logger."""


def build_loggers(
    config: LoggerConfig, run: Run, name: str, tags: list[str], checkpoints: Path | None = None, identity: str = ""
) -> list[Logger]:
    """Build the loggers selected by `logger=`; an empty list on ranks other than 0.

    W&B writes to DIRECTORY/wandb, CSV to DIRECTORY/csv/metrics.csv. For `checkpoints` and `identity`, see `run_id`.
    """
    loggers: list[Logger] = []
    if not run.rank_zero:
        return loggers
    directory = str(run.directory)
    if config.wandb is not None:
        tracked = start_run(
            config.wandb,
            dir=directory,
            name=name,
            group=run.group,
            job_type=run.command,
            tags=list(dict.fromkeys(tag[:MAX_TAG_LENGTH] for tag in tags if tag)),
            config=columns(plain(run.config)),
            id=run_id(checkpoints, identity),
            resume="allow",
        )
        if tracked is not None:
            loggers.append(SafeWandbLogger(experiment=tracked, project=config.wandb.project, save_dir=directory))
    if config.csv is not None:
        every = config.csv.flush_every_n_steps
        loggers.append(SafeCsvLogger(directory, name="csv", version="", flush_logs_every_n_steps=every))
    return loggers


def wandb_run(loggers: Sequence[Logger]) -> Any | None:
    """Return the W&B run of the loggers, or None."""
    return next((one._experiment for one in loggers if isinstance(one, WandbLogger)), None)


def finish(loggers: Sequence[Logger], exit_code: int = 0) -> None:
    """Finish the loggers of a job within a time limit and without raising."""
    for logger in loggers:
        logger.finalize("success" if exit_code == 0 else "failed")
    if (run := wandb_run(loggers)) is not None:
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            state.reason = f"the connection was lost: {reason_of(error)}"
            text = "W&B could not upload all of the run (%s); upload it later with `wandb sync %s`"
            log.warning(text, reason_of(error), relative(run.settings.sync_dir))


def stage_name(config: StageConfig, sources: Sequence[str] = ()) -> str:
    """Return a run name: `cb · adapter · seed 3`, or `cb ← snli+mrpc+rte · seed 3` for a fusion.

    A composition other than AdapterFusion, swept values and a custom name are appended.
    """
    tasks = "+".join(str(task.name) for task in config.task_list)
    composition = getattr(config, "composition", None)
    if composition is not None:
        more = f"+{len(sources) - NAMES_SHOWN} more" if len(sources) > NAMES_SHOWN else ""
        parts = [f"{tasks} ← {'+'.join(sources[:NAMES_SHOWN])}{more}"]
        parts += [] if composition.is_default else [composition.name]
    else:
        adapter = config.adapter.name  # type: ignore[attr-defined]
        method = config.method  # type: ignore[attr-defined]
        shown = f" {adapter}" if method.definition.kind == ADAPTER and adapter != "pfeiffer" else ""
        parts = [tasks, f"{method.name}{shown}"]
    parts.append(f"seed {config.seed}")
    usual = config.default_name()  # type: ignore[attr-defined]
    own = str(config.name)
    own = "" if own == usual else own.removeprefix(f"{usual}-")
    own = re.sub(rf"(^|-)seed-{config.seed}(?=-|$)", "", own).strip("-")
    return " · ".join([*parts, *([own] if own else [])])[:LENGTH]


def columns(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a mapping to columns such as `optim/lr`, omitting None. W&B advises against dots in keys."""
    return {key: value for key, value in flat(values, "/") if value not in (None, {})}


def plain(value: Any) -> Any:
    """Convert to plain containers and scalars for W&B; other values, NaN and infinity become strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def best_is(metric: str) -> str | None:
    """Return `min` for a loss, `max` for a metric, or None for other curves."""
    last = metric.rsplit("/", 1)[-1]
    if last == "loss" or last.endswith("_loss"):
        return "min"
    return "max" if last in SCORES else None


def log_result(loggers: Sequence[Logger], result: Mapping[str, Any]) -> None:
    """Add a result to the W&B summary: `validation/accuracy`, or `best/validation/accuracy` and `best/epoch` of a
    training run, and `epochs`, `speed/seconds`, `parameters/trainable`, ...
    """

    def update(run: Any) -> None:
        values = plain(result)
        scores = columns(values.pop("metrics", None) or {})
        if "best_epoch" in values:  # training run, which already has a curve per metric
            scores = {f"best/{name}": score for name, score in scores.items()}
            scores["best/epoch"] = values["best_epoch"]
        run.summary.update(columns(values) | scores)

    _attempt("log the result", loggers, update)


def log_attention(loggers: Sequence[Logger], record: Mapping[str, Any]) -> None:
    """Log a line of attention.jsonl in W&B: an image, a table, and curves per slot."""

    def update(run: Any) -> None:
        import wandb

        from fusion.reporting.figures import attention_figure

        columns: list[str | int] = ["slot", "source", "mean", "entropy", "value_distance"]
        rows, logged = [], {"epoch": record["epoch"], STEP: record["step"]}
        for slot, values in record["slots"].items():
            numbers = {key: values[key] for key in ("entropy", "value_distance")}
            rows += [[slot, *one, *numbers.values()] for one in zip(record["sources"], values["mean"], strict=True)]
            logged |= {f"attention/{key}/{slot}": one for key, one in numbers.items() if one is not None}
        logged["attention/picture"] = wandb.Image(attention_figure(record), file_type="png")
        logged["attention/table"] = wandb.Table(columns=columns, data=rows)
        with staged_in(Path(run.settings.sync_dir)):  # offline runs refer to the staged file of a table
            run.log(logged, step=record["step"])

    _attempt("log the attention", loggers, update)


def log_errors(loggers: Sequence[Logger], splits: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    """Add the calibration error of each split of classes to the W&B summary, and log its confusion matrix and calibration.

    Args:
        splits: entries of outcomes.json.
        names: names of the labels.
    """

    def update(run: Any) -> None:
        import wandb

        from fusion.reporting.errors import MOST_CLASSES, Errors
        from fusion.reporting.figures import confusion_figure, reliability_figure
        from fusion.reporting.statistics import Predictions

        for split, content in splits.items():
            stored = Predictions.of(content)
            errors = None if stored is None else Errors.of([stored], names)
            if errors is None:
                continue
            drawn = {}
            if len(errors.classes.names) <= MOST_CLASSES:
                drawn["confusion"] = confusion_figure(errors, split)
            if errors.bins:
                run.summary.update({f"calibration/{split}/ece": errors.ece})
                drawn["calibration"] = reliability_figure({split: errors.bins}, "Confidence and accuracy")
            run.log({f"{split}/{key}": wandb.Image(figure, file_type="png") for key, figure in drawn.items()})

    _attempt("log the errors", loggers, update)


def run_reference(loggers: Sequence[Logger]) -> dict[str, Any] | None:
    """Return the W&B run, `{"id", "project", "entity", "url"}`, or None."""
    with contextlib.suppress(Exception):
        if (run := wandb_run(loggers)) is not None:
            place = {"id": run.id, "project": run.project, "entity": run.entity or None}
            return place | {"url": None if run.offline else run.url}
    return None


def log_made(
    loggers: Sequence[Logger],
    folder: Path,
    made: Manifest,
    sources: Sequence[Manifest],
    initial: Manifest | None = None,
) -> None:
    """Log the artifact saved in `folder`, its sources and its initial weights.

    They are added to the run's config. An online run also logs W&B artifacts with the first twelve hash digits as
    their alias; those of an offline run are linked by `python -m fusion.sync`.
    """
    about = {"name": made.name, "hash": made.hash, "kind": made.kind}
    named: dict[str, Any] = about | {"sources": [_named(source) for source in sources]}
    named |= {} if initial is None else {"init_from": _named(initial)}
    used = [*sources, *([] if initial is None else [initial])]
    _log_artifacts(loggers, named, about | {"folder": str(folder.absolute())}, used)


def log_used(loggers: Sequence[Logger], used: Manifest) -> None:
    """Log the artifact that a run evaluates."""
    _log_artifacts(loggers, _named(used) | {"kind": used.kind}, None, [used])


def _log_artifacts(
    loggers: Sequence[Logger], named: dict[str, Any], made: dict[str, Any] | None, used: Sequence[Manifest]
) -> None:
    """Add the artifacts to the config; link them if the run is online, or record them for `fusion.sync`."""

    def update(run: Any) -> None:
        run.config.update({"artifact": named}, allow_val_change=True)

    def link_now(run: Any) -> None:
        about = {"id": run.id, "project": run.project, "entity": run.entity or None, "name": run.name}
        read = [{"name": one.name, "hash": one.hash, "run": _run_of(one)} for one in used]
        links = {"run": about, "made": made, "used": read, "drawn": []}
        file = Path(run.settings.sync_dir).parent / FILE
        write_json(file, links)
        if run.offline:
            return
        future: Future[dict[str, Any]] = Future()

        def call() -> None:
            try:
                future.set_result(link(run, links))
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=call, daemon=True).start()  # W&B has no timeout
        try:
            write_json(file, future.result(LINK_SECONDS))
        except TimeoutError:
            state.reason = f"the server did not respond within {LINK_SECONDS:g} s"
            raise TimeoutError(state.reason) from None

    _attempt("log the artifact", loggers, update)
    _attempt("link the artifacts", loggers, link_now)


def _run_of(artifact: Manifest) -> dict[str, Any] | None:
    """Return the `run_reference` of a manifest, or None if it is missing or malformed."""
    run = artifact.run.wandb or {}
    return run if isinstance(run.get("id"), str) else None


def _named(artifact: Manifest) -> dict[str, Any]:
    """Return name, hash and W&B run id of an artifact for the config."""
    run = _run_of(artifact)
    return {"name": artifact.name, "hash": artifact.hash, **({"run": run["id"]} if run else {})}


def _attempt(what: str, loggers: Sequence[Logger], call: Callable[[Any], None]) -> None:
    """Call with the W&B run, if any; an error becomes a warning."""
    try:
        if (run := wandb_run(loggers)) is not None:
            call(run)
    except Exception as error:
        log.warning("W&B could not %s (%s); the run continues", what, reason_of(error))

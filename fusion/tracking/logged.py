"""What is logged beside a run's curves: its result, its attention weights, and its artifacts."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from fusion.files import write_json
from fusion.tracking.labels import flat, plain
from fusion.tracking.lineage import FILE, link, staged_in
from fusion.tracking.loggers import wandb_run
from fusion.tracking.wandb_run import LINK_SECONDS, STEP, reason_of, state

log = logging.getLogger(__name__)


def log_result(loggers: Sequence[Logger], result: Mapping[str, Any]) -> None:
    """Add a run's result to the W&B summary.

    `best/validation/accuracy` and `best/epoch` of a training (its curves have their own `validation/accuracy.max`),
    `validation/accuracy` of an evaluation; `epochs`, `speed/seconds`, `parameters/trainable`, ...
    """

    def update(run: Any) -> None:
        values = plain(result)
        scores = dict(flat(values.pop("metrics", None) or {}))
        if "best_epoch" in values:  # of a training: each score has a curve already
            scores = {f"best/{name}": score for name, score in scores.items()}
            scores["best/epoch"] = values["best_epoch"]
        run.summary.update(dict(flat(values)) | scores)

    _attempt("log the result", loggers, update)


def log_attention(loggers: Sequence[Logger], record: Mapping[str, Any]) -> None:
    """Log a line of attention.jsonl in W&B: an image, a table, and curves of each slot's numbers."""

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
        with staged_in(Path(run.settings.sync_dir)):  # offline, the file of a table stays where it is staged
            run.log(logged, step=record["step"])

    _attempt("log the attention", loggers, update)


def run_reference(loggers: Sequence[Logger]) -> dict[str, Any] | None:
    """The job's W&B run, `{"id", "project", "entity", "url"}`; None if it has none."""
    with contextlib.suppress(Exception):
        if (run := wandb_run(loggers)) is not None:
            place = {"id": run.id, "project": run.project, "entity": run.entity or None}
            return place | {"url": None if run.offline else run.url}
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
    """Log which artifact a run made (STORE/NAME) and from which sources.

    The run's config always names them. An online run also gets W&B artifacts, with the first twelve digits of the
    hash as their alias; those of an offline run are linked by `python -m fusion.sync`.

    Args:
        sources: `{"name", "hash", "run"}` each; `run` is a `run_reference` or None.
        init_from: the artifact whose weights the training started from, in the same form.
    """
    made = {"name": name, "hash": hash, "kind": kind}
    artifact: dict[str, Any] = made | {"sources": [_source(source) for source in sources]}
    artifact |= {} if init_from is None else {"init_from": _source(init_from)}
    used = [*sources, *([] if init_from is None else [init_from])]
    _log_artifact(loggers, artifact, made | {"folder": str(folder.absolute())}, used)


def log_use(loggers: Sequence[Logger], artifact: Mapping[str, Any]) -> None:
    """Log which artifact a run evaluates: `{"kind", "name", "hash", "run"}`."""
    _log_artifact(loggers, _source(artifact) | {"kind": artifact["kind"]}, None, [artifact])


def _log_artifact(
    loggers: Sequence[Logger], artifact: dict[str, Any], made: dict[str, Any] | None, used: Sequence[Mapping[str, Any]]
) -> None:
    """Name the artifacts in the config; link them now if the run is online, or record them for later."""

    def update(run: Any) -> None:
        run.config.update({"artifact": plain(artifact)}, allow_val_change=True)

    def link_now(run: Any) -> None:
        about = {"id": run.id, "project": run.project, "entity": run.entity or None, "name": run.name}
        read = [{"name": one["name"], "hash": one["hash"], "run": _run_of(one)} for one in used]
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

        threading.Thread(target=call, daemon=True).start()  # W&B itself has no time limit
        try:
            write_json(file, future.result(LINK_SECONDS))
        except TimeoutError:
            state.reason = f"the server did not respond within {LINK_SECONDS:g} s"
            raise TimeoutError(state.reason) from None

    _attempt("log the artifact", loggers, update)
    _attempt("link the artifacts", loggers, link_now)


def _run_of(artifact: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `run_reference` in a manifest, which may hold anything."""
    run = artifact.get("run")
    return dict(run) if isinstance(run, Mapping) and isinstance(run.get("id"), str) else None


def _source(artifact: Mapping[str, Any]) -> dict[str, Any]:
    """As the run's config names an artifact: by hash, and by run id where that is known."""
    run = _run_of(artifact)
    return {"name": artifact["name"], "hash": artifact["hash"], **({"run": run["id"]} if run else {})}


def _attempt(what: str, loggers: Sequence[Logger], call: Callable[[Any], None]) -> None:
    """Call it with the W&B run, if there is one; an error is a warning."""
    try:
        if (run := wandb_run(loggers)) is not None:
            call(run)
    except Exception as error:
        log.warning("W&B could not %s (%s); the run continues", what, reason_of(error))

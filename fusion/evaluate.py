"""Evaluate a stored artifact on a split of its tasks, or of a different task with the same labels."""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion.cli.app import command
from fusion.cli.console import say
from fusion.config.commands import EvaluateConfig
from fusion.errors import UserError
from fusion.model.head_selection import select_heads
from fusion.runs.inputs import read_used
from fusion.runs.run import Run
from fusion.store.compatibility import as_trained, data_folder_of
from fusion.store.lookup import read_manifest
from fusion.text import key_of, log_once, override, shortened

log = logging.getLogger(__name__)


def check(config: EvaluateConfig, run: Run) -> None:
    from fusion.data.splits import check_source

    manifest = read_used(config)
    for head in select_heads(manifest, config.task):
        check_source(head.task, as_trained(manifest, config.data, head.task.name), [config.split])


def use_trained_data(config: EvaluateConfig, overrides: Sequence[str]) -> None:
    """Set data.dir to the data folder that the artifact was trained with, unless it is set (null reads from the Hub).

    Raises UserError if that folder does not exist.
    """
    if config.data.dir is not None or "data.dir" in map(key_of, overrides):
        return
    manifest = read_manifest(config.artifact, Path(config.store))
    folder = data_folder_of(manifest)
    task = None if config.task is None else str(config.task.name)
    if folder is None or not (task in (None, *manifest.task_names) or (Path(folder) / str(task)).is_dir()):
        return  # a different task may have different data
    shown = shortened(shlex.quote(override("data.dir", folder)))
    if not Path(folder).is_dir():
        raise UserError(
            f"{shown}: the data folder that {manifest.name} was trained with does not exist\n"
            "Set data.dir=DIR to a different folder, or data.dir=null to read from the Hub"
        )
    config.data.dir = folder
    log_once(log, f"{shown}, the data folder that {manifest.name} was trained with")


@command("evaluate", EvaluateConfig, check=check, settle=use_trained_data)
def main(config: EvaluateConfig, run: Run) -> dict[str, Any]:
    if not run.rank_zero or (config.logger.wandb is None and config.logger.csv is None):
        return evaluate(config, run)
    from fusion.tracking.loggers import LENGTH, SafeCsvLogger, build_loggers, columns, finish, log_result, log_used

    manifest = read_manifest(config.artifact, Path(config.store))
    tasks = [str(head.task.name) for head in select_heads(manifest, config.task)]
    loggers = build_loggers(
        config.logger,
        run,
        name=f"{manifest.name} on {'+'.join(tasks)} {config.split}"[:LENGTH],
        tags=[*tasks, manifest.backbone.name_or_path.rsplit("/", 1)[-1], manifest.made_by],
    )
    with contextlib.ExitStack() as stack:
        stack.push(lambda kind, *_: finish(loggers, 0 if kind is None else 1))
        result = evaluate(config, run)
        log_result(loggers, result)
        log_used(loggers, manifest)
        for logger in loggers:
            if isinstance(logger, SafeCsvLogger):  # it has no summary, so log a row of metrics
                logger.log_metrics(columns(result["metrics"]), 0)
        return result


def evaluate(config: EvaluateConfig, run: Run) -> dict[str, Any]:
    """Evaluate the artifact, write the predictions, and return the content of result.json."""
    from fusion.analysis.evaluation import evaluate_model
    from fusion.cli.console import rows_progress
    from fusion.model.inference import load_model
    from fusion.training.predictions import write_predictions

    loaded = load_model(config, fold=True)
    found = evaluate_model(loaded, config, rows_progress)
    for line in found.lines:
        say(line)
    write_predictions(run.directory, found.stored)
    manifest, seconds = loaded.artifact.manifest, found.seconds
    return {
        "artifact": str(loaded.artifact.path),
        "name": manifest.name,
        "hash": manifest.hash,
        "kind": manifest.kind,
        "task": "+".join(found.tasks),
        "drop": config.drop,
        "metrics": found.metrics,
        "rows": found.examples,
        "speed": {
            "seconds": seconds,
            "examples_per_second": found.examples / seconds,
            "tokens_per_second": found.tokens / seconds,
        },
    }


if __name__ == "__main__":
    main()

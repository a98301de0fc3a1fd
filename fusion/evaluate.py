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
from fusion.store.lookup import read_manifest, source_manifests
from fusion.tasks.table import kind_of
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
    from fusion.analysis.unseen import check_unseen
    from fusion.cli.console import rows_progress
    from fusion.data.encode import encode
    from fusion.data.rows import load_splits
    from fusion.data.splits import evaluation_splits
    from fusion.model.inference import load_model, predict
    from fusion.training.predictions import RowPredictions, write_predictions

    loaded = load_model(config)
    manifest = loaded.artifact.manifest
    heads = select_heads(manifest, config.task)
    trained = [manifest, *source_manifests(manifest, loaded.artifact.path.parent)]
    metrics: dict[str, dict[str, float]] = {}
    stored: dict[str, dict[str, Any]] = {}
    count, seconds, tokens = 0, 0.0, 0
    data_of = {head.index: as_trained(manifest, config.data, head.task.name) for head in heads}
    splits = [
        (head, split) for head in heads for split in evaluation_splits(head.task, config.split, data_of[head.index])
    ]
    for head, split in splits:
        task, kind, data = head.task, kind_of(head.task), data_of[head.index]
        check_unseen(trained, task, data, split)
        rows = load_splits(task, data, [split], manifest.data.labels.get(str(task.name)))[0][split]
        if rows.labels is None:
            raise UserError(f"split={split} has no labels, so metrics cannot be computed; use fusion.predict")
        backbone = loaded.backbone
        encoded = encode(rows, backbone.tokenizer, loaded.max_length, config.data.cache_dir, backbone.family.causal)
        encoded.task = head.index
        with rows_progress(f"{manifest.name} on {task.name} {split}", len(rows)) as advance:
            found = predict(loaded.model, encoded, config.data, loaded.device, advance=advance)
        assert encoded.labels is not None
        predictions, labels = kind.predict(kind.outputs(found.scores), head.decision), kind.plain_labels(encoded.labels)
        key = split if len(heads) == 1 else f"{task.name}/{split}"
        metrics[key] = kind.metrics(task, labels, predictions)
        found_rows = RowPredictions(list(range(len(rows))), predictions, labels, kind.confidence(found.scores))
        stored[key] = found_rows.as_stored(encoded, task, rows)
        count, seconds, tokens = count + len(rows), seconds + found.seconds, tokens + found.tokens
        by = f", head of {head.trained_on}" if manifest.multitask and head.trained_on != task.name else ""
        dropped = f", {config.drop} layers dropped" if config.drop else ""
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics[key].items())
        say(f"{manifest.name} on {task.name} {split} ({len(rows)} examples{by}{dropped}): {shown}")
    write_predictions(run.directory, stored)
    return {
        "artifact": str(loaded.artifact.path),
        "name": manifest.name,
        "hash": manifest.hash,
        "kind": manifest.kind,
        "task": "+".join(str(head.task.name) for head in heads),
        "drop": config.drop,
        "metrics": metrics,
        "rows": count,
        "speed": {"seconds": seconds, "examples_per_second": count / seconds, "tokens_per_second": tokens / seconds},
    }


if __name__ == "__main__":
    main()

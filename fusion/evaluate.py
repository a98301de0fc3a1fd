"""Scores of a stored artifact on a split of its own tasks, or of another one with the same labels.

python -m fusion.evaluate artifact=rte-adapterfusion split=validation
"""

from __future__ import annotations

import functools
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion.cli.app import command
from fusion.cli.console import say
from fusion.config.commands import EvaluateConfig
from fusion.errors import UserError
from fusion.model.head_selection import answers, own_tasks
from fusion.runs.inputs import read_used
from fusion.runs.run import Run
from fusion.store.lookup import read_manifest, source_manifests
from fusion.store.trained_data import as_trained, data_folder_of
from fusion.text import key_of, override, shortened

log = logging.getLogger(__name__)


def check(config: EvaluateConfig, run: Run) -> None:
    """What can be said before a model is loaded."""
    from fusion.data.splits import check_source

    manifest = read_used(config)
    for answer in answers(manifest, config.task):
        check_source(answer.task, as_trained(manifest, config.data, answer.task.name), [config.split])


def use_trained_data(config: EvaluateConfig, overrides: Sequence[str]) -> None:
    """Read the artifact's rows where its training read them, unless data.dir= is given; data.dir=null: the hub.

    Raises:
        UserError: that folder is gone.
    """
    if config.data.dir is not None or "data.dir" in map(key_of, overrides):
        return
    manifest = read_manifest(config.artifact, Path(config.store))
    folder = data_folder_of(manifest)
    if folder is None:
        return
    own = [task.name for task in own_tasks(manifest)]
    other = config.task is not None and config.task.name not in own
    if other and not (Path(folder) / str(config.task and config.task.name)).is_dir():
        return  # another task than the artifact's may come from anywhere
    shown = shortened(shlex.quote(override("data.dir", folder)))
    if not Path(folder).is_dir():
        raise UserError(
            f"{manifest.name} was trained on the rows in {shown}, and that folder is gone\n"
            "data.dir=DIR names another one, data.dir=null takes the hub's rows"
        )
    config.data.dir = folder
    _say_once(f"{shown}, as {manifest.name} was trained")


@functools.cache
def _say_once(line: str) -> None:
    """Once a process, which settles a job when it is planned and when its turn comes."""
    log.info("%s", line)


@command("evaluate", EvaluateConfig, check=check, settle=use_trained_data)
def main(config: EvaluateConfig, run: Run) -> dict[str, Any]:
    if config.logger.wandb is None and config.logger.csv is None:
        return evaluate(config, run)
    from fusion.tracking.labels import LENGTH, flat
    from fusion.tracking.logged import log_result, log_use
    from fusion.tracking.loggers import SafeCsvLogger, build_loggers, finish

    manifest = read_manifest(config.artifact, Path(config.store))
    tasks = [str(answer.task.name) for answer in answers(manifest, config.task)]
    about = {key: getattr(manifest, key) for key in ("kind", "name", "hash")}
    about["run"] = manifest.run.wandb
    tags = [*tasks, manifest.backbone.name_or_path.rsplit("/", 1)[-1], manifest.made_by]
    loggers = build_loggers(
        config.logger,
        directory=run.directory,
        name=f"{manifest.name} on {'+'.join(tasks)} {config.split}"[:LENGTH],
        group=run.group,
        job_type="evaluate",
        tags=tags,
        config_values=run.config,
    )
    exit_code = 1
    try:
        result = evaluate(config, run)
        log_result(loggers, result)
        log_use(loggers, about)
        for logger in loggers:
            if isinstance(logger, SafeCsvLogger):  # it has no summary: a row of scores
                logger.log_metrics(dict(flat(result["metrics"])), 0)
        exit_code = 0
        return result
    finally:
        finish(loggers, exit_code)


def evaluate(config: EvaluateConfig, run: Run) -> dict[str, Any]:
    """Score the artifact on the split, and give what result.json holds."""
    from fusion.analysis.unseen import check_unseen
    from fusion.backbones.load import load_backbone
    from fusion.cli.console import rows_progress
    from fusion.data.encode import encode
    from fusion.data.rows import load_splits
    from fusion.data.splits import evaluation_splits
    from fusion.model.build import backbone_of, stored_model
    from fusion.model.inference import device_of, predict
    from fusion.store.artifacts import load
    from fusion.training.metrics import predicted, score_predictions
    from fusion.training.predictions import RowPredictions, write_predictions

    device = device_of(config.accelerator)
    artifact = load(config.artifact, Path(config.store))
    manifest = artifact.manifest
    scored = answers(manifest, config.task)
    name, revision = backbone_of(manifest, config.backbone)
    max_length = config.data.max_length or manifest.data.max_length
    backbone = load_backbone(name, revision, config.backbone.trust_remote_code, max_length)
    model = stored_model(artifact, artifact.path.parent, backbone, config.drop)
    trained = [manifest, *source_manifests(manifest, artifact.path.parent)]
    metrics: dict[str, dict[str, float]] = {}
    seen: dict[str, dict[str, Any]] = {}
    rows_seen, seconds, tokens = 0, 0.0, 0
    splits = [
        (answer, data, split)
        for answer in scored
        for data in [as_trained(manifest, config.data, answer.task.name)]
        for split in evaluation_splits(answer.task, config.split, data)
    ]
    for answer, data, split in splits:
        task = answer.task
        check_unseen(trained, task, data, split)
        rows = load_splits(task, data, [split], manifest.labels_read_as(task.name))[0][split]
        if rows.labels is None:
            raise UserError(f"split={split}: its rows have no labels to score against; use fusion.predict")
        encoded = encode(rows, backbone.tokenizer, max_length, config.data.cache_dir)
        encoded.task = answer.head
        with rows_progress(f"{manifest.name} on {task.name} {split}", len(rows)) as advance:
            predictions = predict(
                model,
                encoded,
                config.data.batch_size,
                device,
                tokens_per_batch=config.data.tokens_per_batch,
                advance=advance,
            )
        key = split if len(scored) == 1 else f"{task.name}/{split}"
        said = RowPredictions.of_all(
            encoded, task, predicted(task, predictions.scores, encoded.labels, answer.decision)
        )
        metrics[key] = score_predictions(task, said.predictions, said.labels)
        seen[key] = said.as_stored(encoded)
        rows_seen, seconds, tokens = (
            rows_seen + len(rows),
            seconds + predictions.seconds,
            tokens + predictions.tokens,
        )
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics[key].items())
        another = manifest.multitask is not None and answer.head_task != task.name
        dropped = f", {config.drop} layers dropped" if config.drop else ""
        by = f", by the head of {answer.head_task}" if another else ""
        say(f"{manifest.name} on {task.name} {split} ({len(rows)} rows{by}{dropped}): {shown}")
    write_predictions(run.directory, seen)
    return {
        "artifact": str(artifact.path),
        "name": manifest.name,
        "hash": manifest.hash,
        "kind": manifest.kind,
        "task": "+".join(str(answer.task.name) for answer in scored),
        "drop": config.drop,
        "metrics": metrics,
        "rows": rows_seen,
        "speed": {
            "seconds": seconds,
            "examples_per_second": rows_seen / seconds,
            "tokens_per_second": tokens / seconds,
        },
    }


if __name__ == "__main__":
    main()

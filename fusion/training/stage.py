"""The end of both stages: fit the model, store it, log and return the result."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import Logger

from fusion.backbones.compiling import compile_layers
from fusion.errors import TrainingError
from fusion.model.feature_cache import cache_features
from fusion.runs.output import result_of
from fusion.runs.provenance import circumstances
from fusion.store.artifacts import save
from fusion.store.compatibility import DIVERGED
from fusion.store.lookup import read_folder
from fusion.store.manifest import Manifest
from fusion.tracking.loggers import (
    build_loggers,
    finish,
    log_attention,
    log_made,
    log_result,
    run_reference,
    stage_name,
)
from fusion.training.attention import AttentionRecorder
from fusion.training.description import manifest_of_fit, result_of_fit
from fusion.training.divergence import shown
from fusion.training.fit import Fit, fit
from fusion.training.history import History
from fusion.training.predictions import write_predictions
from fusion.training.spec import FitSpec, StageSpec

log = logging.getLogger(__name__)


def train_and_store(spec: StageSpec) -> dict[str, Any]:
    """Fit, store under the output's name, and return the content of result.json.

    Raises:
        GuardError: something else than the declared parameters changed; nothing is stored.
        TrainingError: the loss was no longer finite (the best epoch before is stored under another name), or the
            store could not be written (the checkpoint is kept).
    """
    loggers = _loggers(spec)
    exit_code = 1
    try:
        result = _train_and_store(spec, loggers)
        exit_code = 0
        return result
    finally:
        finish(loggers, exit_code)


def _train_and_store(spec: StageSpec, loggers: list[Logger]) -> dict[str, Any]:
    config, run = spec.config, spec.run
    origin = circumstances() if run.rank_zero else {}  # now: the checkout may change during the training
    if spec.initial is not None:
        origin["init_from"] = {"name": spec.initial.name, "hash": spec.initial.hash}
    if (tracked := run_reference(loggers)) is not None:
        origin["wandb"] = tracked
    fitted = fit(spec.model, _fit_spec(spec, loggers))
    if not run.rank_zero:
        return {}
    result = result_of_fit(spec, fitted)
    manifest = manifest_of_fit(spec, fitted, result, origin)
    if config.trainer.fast_dev_run:
        log.info("trainer.fast_dev_run: the run works; nothing is stored")
        return result
    if fitted.broken is not None:
        kept = _store(spec, manifest.changed(name=f"{spec.output.name}{DIVERGED}"), overwrite=True)
        scores = "  ".join(f"{split} {values}" for split, values in fitted.metrics.items())
        raise TrainingError(
            f"{fitted.broken}\nThe best epoch before it ({fitted.best_epoch}: {scores}) is stored as {kept.name}"
        )
    path = _store(spec, manifest, config.overwrite)
    log.info("stored %s", path)
    _log_findings(fitted)
    stored = read_folder(path)
    result = result_of(stored, path)
    rows = spec.rows.validation
    write_predictions(run.directory, {split: found.as_stored(rows[split]) for split, found in fitted.predicted.items()})
    log_result(loggers, result)
    log_made(loggers, path, stored, spec.sources, spec.initial)
    return result


def _loggers(spec: StageSpec) -> list[Logger]:
    config, run, output = spec.config, spec.run, spec.output
    tasks = [str(task.name) for task in config.task_list]
    loggers = build_loggers(
        config.logger,
        run,
        name=stage_name(config, [source.name for source in spec.sources]),
        tags=[*tasks, config.backbone.name_or_path.rsplit("/", 1)[-1], spec.tag],
        checkpoints=output.checkpoints,
        identity=output.identity,
    )
    if run.rank_zero and not config.trainer.barebones:  # which allows no logger
        run_name = output.checkpoints.name
        loggers.append(History(run.directory, run=run_name, name=output.name, command=run.command))
    return loggers


def _fit_spec(spec: StageSpec, loggers: list[Logger]) -> FitSpec:
    config, model, backbone = spec.config, spec.model, spec.backbone
    recorder = AttentionRecorder(
        [source.name for source in spec.sources], spec.run.directory, lambda record: log_attention(loggers, record)
    )

    def prepare(device: torch.device) -> str | None:
        splits = [*spec.rows.training, *spec.rows.validation.values()]
        once = bool(config.trainer.fast_dev_run) or config.trainer.max_epochs == 1 or not model.trainable()
        features = cache_features(
            model, splits, config.backbone, backbone.fingerprint, device, config.data.cache_dir, once
        )
        if config.compile:  # after the features, which are computed only once
            compile_layers(backbone.family.layer_list(backbone.model))
        return features

    return FitSpec(
        tasks=config.task_list,
        rows=spec.rows,
        data=config.data,
        optim=config.optim,
        trainer=config.trainer,
        checkpoints=spec.output.checkpoints,
        seed=config.seed,
        objective=spec.objective,
        resume=config.resume,
        checkpoint_minutes=config.checkpoint_minutes,
        tokenizer=backbone.tokenizer_hash,
        loggers=loggers,
        callbacks=[recorder],
        prepare=prepare,
    )


def _store(spec: StageSpec, manifest: Manifest, overwrite: bool) -> Path:
    output, model = spec.output, spec.model
    try:
        return save(output.store, manifest, model.weight_state(), model.head_state(), overwrite)
    except OSError as error:
        raise TrainingError(
            f"{output.store / manifest.name} cannot be written ({error.strerror or error}).\n"
            f"Free disk space or fix the folder, then run the same command again: {output.outlook}"
        ) from error


def _log_findings(fitted: Fit) -> None:
    if fitted.diverged is not None:
        log.warning(
            "the training diverged: %s. The best epoch, %d, is stored; lower optim.lr, or raise optim.warmup",
            shown(fitted.diverged),
            fitted.best_epoch,
        )
    for name, decision in fitted.decisions.items():
        for key, value in decision.items():
            log.info("%s: %s %.4f, chosen on the validation split and stored", name, key, value)

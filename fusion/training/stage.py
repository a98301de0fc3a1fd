"""The common part of both stages: fit the model, store it with a manifest, log and return the result."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import Logger

from fusion.backbones.files import STAMP
from fusion.backbones.layer_calls import compile_layers
from fusion.backbones.load import Backbone
from fusion.config.stages import StageConfig
from fusion.errors import TrainingError
from fusion.model.adapted import AdaptedModel
from fusion.model.build import describe_backbone
from fusion.model.feature_cache import cache_features
from fusion.runs.output import RunOutput, result_of
from fusion.runs.provenance import circumstances, versions
from fusion.runs.run import Run
from fusion.store.artifacts import save
from fusion.store.compatibility import DIVERGED
from fusion.store.lookup import read_folder
from fusion.store.manifest import Manifest
from fusion.tracking.loggers import (
    build_loggers,
    finish,
    log_attention,
    log_errors,
    log_made,
    log_result,
    run_reference,
    stage_name,
)
from fusion.training.fit import Fit, FitSpec, fit
from fusion.training.module import Objective
from fusion.training.predictions import write_predictions
from fusion.training.records import AttentionRecorder, History
from fusion.training.task_rows import TaskRows, split_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageSpec:
    config: StageConfig
    run: Run
    output: RunOutput
    model: AdaptedModel
    backbone: Backbone
    rows: TaskRows
    tag: str  # W&B tag of the run: the method of stage 1 or the composition of stage 2
    parts: Mapping[str, dict[str, Any] | None]  # the entries `method`, `adapter` and `composition` of the manifest
    objective: Objective
    sources: Sequence[Manifest] = ()  # of a fusion, in order
    initial: Manifest | None = None  # artifact that the model is initialized from, if any


def train_and_store(spec: StageSpec) -> dict[str, Any]:
    """Fit the model, store it under the output's name, and return the content of result.json.

    Raises:
        GuardError: if a tensor that is not declared trainable has changed. No artifact is saved.
        TrainingError: if the loss is no longer finite (the best epoch so far is stored as NAME-diverged), or the store
            cannot be written (the checkpoint is kept).
    """
    config, run = spec.config, spec.run
    loggers = _loggers(spec)
    with contextlib.ExitStack() as stack:
        stack.push(lambda kind, *_: finish(loggers, 0 if kind is None else 1))
        origin = circumstances() if run.rank_zero else {}  # read now, since the checkout may change during training
        if spec.initial is not None:
            origin["init_from"] = {"name": spec.initial.name, "hash": spec.initial.hash}
        if (tracked := run_reference(loggers)) is not None:
            origin["wandb"] = tracked
        fitted = _fit(spec, loggers)
        if not run.rank_zero:
            return {}
        result = _result_of(spec, fitted)
        manifest = _manifest_of(spec, fitted, result, origin)
        if config.trainer.fast_dev_run:
            log.info("the run succeeded; with trainer.fast_dev_run (debug=one_batch), no artifact is saved")
            return result
        if fitted.broken is not None:
            kept = _store(spec, manifest.changed(name=f"{spec.output.name}{DIVERGED}"), overwrite=True)
            scores = "  ".join(f"{split} {values}" for split, values in fitted.metrics.items())
            raise TrainingError(
                f"{fitted.broken}\nThe best epoch so far ({fitted.best_epoch}: {scores}) was saved as {kept.name}"
            )
        path = _store(spec, manifest, config.overwrite)
        log.info("stored %s", path)
        _log_findings(fitted, config)
        stored = read_folder(path)
        result = result_of(stored, path)
        validation, tasks = spec.rows.validation, config.task_list
        predicted = {
            split: one.as_stored(validation[split], tasks[validation[split].task], spec.rows.examples.get(split))
            for split, one in fitted.predicted.items()
        }
        write_predictions(run.directory, predicted)
        log_result(loggers, result)
        if len(tasks) == 1:
            log_errors(loggers, predicted, list(map(str, tasks[0].labels or ())))
        log_made(loggers, path, stored, spec.sources, spec.initial)
        return result


def _loggers(spec: StageSpec) -> list[Logger]:
    config, run, output = spec.config, spec.run, spec.output
    name = stage_name(config, [source.name for source in spec.sources])
    tags = [*(str(task.name) for task in config.task_list), config.backbone.name_or_path.rsplit("/", 1)[-1], spec.tag]
    loggers = build_loggers(config.logger, run, name, tags, output.checkpoints, output.identity)
    if run.rank_zero and not config.trainer.barebones:  # barebones does not allow loggers
        loggers.append(History(run.directory, run=output.checkpoints.name, name=output.name, command=run.command))
    return loggers


def _fit(spec: StageSpec, loggers: list[Logger]) -> Fit:
    config, model, backbone, rows = spec.config, spec.model, spec.backbone, spec.rows
    sources = [source.name for source in spec.sources]
    recorder = AttentionRecorder(sources, spec.run.directory, lambda record: log_attention(loggers, record))

    def prepare(device: torch.device) -> str | None:
        splits = [*rows.training, *rows.validation.values()]
        once = bool(config.trainer.fast_dev_run) or config.trainer.max_epochs == 1 or not model.trainable()
        features = None
        if not config.trainer.shards:  # no process will have all weights
            features = cache_features(
                model, splits, config.backbone, backbone.fingerprint, device, config.data.cache_dir, once
            )
        if config.compile:  # after the features, whose computation does not need compiled layers
            compile_layers(model.layers())
        return features

    checkpoints, tokenizer = spec.output.checkpoints, backbone.tokenizer_hash
    return fit(FitSpec(model, config, rows, spec.objective, checkpoints, tokenizer, loggers, [recorder], prepare))


def _store(spec: StageSpec, manifest: Manifest, overwrite: bool) -> Path:
    output, model = spec.output, spec.model
    try:
        return save(output.store, manifest, model.weight_state(), model.head.stored_state(), overwrite)
    except OSError as error:
        raise TrainingError(
            f"{output.store / manifest.name} cannot be written ({error.strerror or error}).\n"
            f"Free disk space or fix the folder, then rerun the same command: {output.outlook}"
        ) from error


def _log_findings(fitted: Fit, config: StageConfig) -> None:
    if (diverged := fitted.diverged) is not None:
        log.warning(
            f"training diverged: the training loss of the last epoch is {diverged['train_loss']:.4g}, above the limit "
            f"of {diverged['limit']:.4g}. The best epoch, {fitted.best_epoch}, was saved; lower optim.lr or increase "
            "optim.warmup"
        )
    if found := fitted.not_learned:
        log.warning(
            "the model has not learned %s: %s\nIncrease %s or optim.lr (now %g), add training examples, or check the labels",
            *(found["task"], _signs(found), _longer(config), config.optim.rate),
        )
    for name, decision in fitted.decisions.items():
        for key, value in decision.items():
            log.info("%s: %s %.4f, selected on the validation split and saved", name, key, value)


def _signs(found: Mapping[str, Any]) -> str:
    signs = []
    if "score" in found:
        signs.append(
            "{metric} {score:.4f} is not above {majority:.4f}, that of the most frequent label".format_map(found)
        )
    if "train_loss" in found:
        signs.append(
            "the training loss of the last epoch is {train_loss:.4g}, that of a constant prediction "
            "{constant_loss:.4g}".format_map(found)
        )
    return "; ".join(signs)


def _longer(config: StageConfig) -> str:
    """Return the setting that extends the training."""
    trainer, optim = config.trainer, config.optim
    if trainer.max_epochs is not None:
        return f"trainer.max_epochs (now {trainer.max_epochs})"
    return f"optim.min_steps (now {optim.min_steps})"


def _result_of(spec: StageSpec, fitted: Fit) -> dict[str, Any]:
    """Return the content of result.json that is known before the artifact is stored."""
    config, model = spec.config, spec.model
    trainable = sum(parameter.numel() for parameter in model.trainable().values())
    state = model.state_dict(keep_vars=True).keys()  # non-persistent buffers are computed, not learned
    frozen = sum(tensor.numel() for name, tensor in model.frozen().items() if name in state)
    result = {
        "stage": 2 if spec.output.kind == "fusion" else 1,
        "task": "+".join(str(task.name) for task in config.task_list),
        "name": config.name,
        "seed": config.seed,
        "backbone": {"name": config.backbone.name_or_path, "fingerprint": spec.backbone.fingerprint},
        "metrics": fitted.metrics,
        "best_epoch": fitted.best_epoch,
        "epochs": fitted.epochs,
        "parameters": {"trainable": trainable, "frozen": frozen},
        "speed": fitted.speed,
        "sources": [source.name for source in spec.sources],
    }
    return result if fitted.diverged is None else result | {"diverged": fitted.diverged}


def _manifest_of(spec: StageSpec, fitted: Fit, result: dict[str, Any], origin: dict[str, Any]) -> Manifest:
    """Return the manifest. origin: when and where the run started, its W&B run and initial artifact."""
    config, run, output, backbone = spec.config, spec.run, spec.output, spec.backbone
    tasks = config.task_list
    described = [dataclasses.asdict(task) for task in tasks]
    heads = []
    for head, task in zip(spec.model.heads, tasks, strict=True):
        decision = fitted.decisions.get(str(task.name))
        heads.append(head.shape | ({"decision": decision} if decision else {}))
    multitask = {
        str(values["name"]): {"task": values, "head": head} for values, head in zip(described, heads, strict=True)
    }
    train = {split_name(tasks, encoded.task, "train"): encoded for encoded in spec.rows.training}
    splits = train | spec.rows.validation
    return Manifest.of(
        kind=output.kind,
        name=output.name,
        task=described[0],
        **{"method": None, "adapter": None, "composition": None, **spec.parts},
        sources=[{"name": source.name, "hash": source.hash} for source in spec.sources],
        metrics=fitted.metrics,
        seed=config.seed,
        versions=versions(),
        result=result,
        backbone=describe_backbone(config.backbone, backbone),
        head=heads[0],
        multitask=multitask if len(tasks) > 1 else None,
        data={
            "max_length": config.data.max_length,
            "fingerprints": {split: encoded.fingerprint for split, encoded in splits.items()},
            "labels": spec.rows.labels,
        },
        run={
            "identity": output.identity,
            "config": output.config,
            "overrides": list(run.overrides),
            "directory": str(run.directory),
            **({} if backbone.stamp is None else {STAMP: backbone.stamp}),
            **origin,
        },
    )

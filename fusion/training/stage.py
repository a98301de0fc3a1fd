"""The end of both stages: fit a model on the task's rows, store what trained, say how it went."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fusion.backbones.compiling import compile_layers
from fusion.backbones.files import STAMP
from fusion.backbones.load import Backbone
from fusion.config.stages import StageConfig
from fusion.config.task import TaskConfig
from fusion.data.encode import EncodedRows, encode
from fusion.data.rows import evaluation_splits, load_splits
from fusion.errors import TrainingError
from fusion.layers.heads import TaskHead, TaskHeads
from fusion.model.adapted import AdaptedModel
from fusion.model.feature_cache import cache_features
from fusion.runs.output import RunOutput, result_of
from fusion.runs.provenance import circumstances, versions
from fusion.runs.run import Run
from fusion.store.artifacts import save
from fusion.store.lookup import read_folder
from fusion.store.manifest import Manifest
from fusion.store.unfit import DIVERGED
from fusion.tasks.kind import Decision
from fusion.tracking.labels import stage_name
from fusion.tracking.tracking import (
    build_loggers,
    finish,
    log_attention,
    log_lineage,
    log_result,
    run_reference,
)
from fusion.training.attention import AttentionRecorder
from fusion.training.class_weights import set_class_weights
from fusion.training.divergence import shown
from fusion.training.fit import Fit, fit
from fusion.training.history import History
from fusion.training.outcomes import outcomes, write_outcomes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskRows:
    """The tokenised rows of a task, or of several: what trains, one split a task, and the validation splits by name.

    Of several tasks, a split's name begins with the task's: `cb/validation`. `labels` is the way in which the labels of
    each task are read, by the task's name, see `load_splits`.
    """

    training: list[EncodedRows]
    validation: dict[str, EncodedRows]
    labels: dict[str, str] = field(default_factory=dict)


def load_task_rows(config: StageConfig, backbone: Backbone) -> TaskRows:
    """Read, check and tokenise the training and validation rows of all tasks of the config.

    Raises:
        UserError: what is wrong with the data, by file and row.
    """
    assert config.data.max_length is not None
    loaded = TaskRows([], {})
    tasks = config.task_list
    for number, task in enumerate(tasks):
        splits = ["train", *evaluation_splits(task, "validation", config.data)]
        loaded_rows, way = load_splits(task, config.data, splits)
        if way is not None:
            loaded.labels[str(task.name)] = way
            log.info("%s: labels read as %s", task.name, way)
        for split, rows in loaded_rows.items():
            encoded = encode(rows, backbone.tokenizer, config.data.max_length, config.data.cache_dir)
            encoded.task = number
            if split == "train":
                loaded.training.append(encoded)
            else:
                loaded.validation[split_name(tasks, number, split)] = encoded
            log.info(
                "%s %s: %d rows%s",
                task.name,
                split,
                len(rows),
                f", {rows.ignored} without a label left out" if rows.ignored else "",
            )
    set_class_weights(config.loss, tasks, loaded.training)
    return loaded


def split_name(tasks: Sequence[TaskConfig], number: int, split: str) -> str:
    """What a split is called in metrics: of several tasks, with the name of the one that it belongs to."""
    return split if len(tasks) == 1 else f"{tasks[number].name}/{split}"


def train_and_store(
    config: StageConfig,
    run: Run,
    entry: RunOutput,
    model: AdaptedModel,
    backbone: Backbone,
    rows: TaskRows,
    *,
    tag: str,
    method: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    composition: dict[str, Any] | None = None,
    sources: Sequence[Manifest] = (),
    loss_weights: dict[str, float] | None = None,
    robust_drop: bool = False,
    temperature: float = 1.0,
    initial: Manifest | None = None,
) -> dict[str, Any]:
    """Fit, store under the entry's name, and give what result.json holds.

    Args:
        tag: how the run is tagged: the method of stage 1, the composition of stage 2.
        method, adapter, composition: what the manifest says of what trains inside the backbone and in its slots.
        sources: of a fusion, in order.
        loss_weights: of the named terms that the model adds to the loss.
        robust_drop: whether each batch leaves out a random number of the first layers' slots.
        temperature: of several tasks, how they are drawn.
        initial: the artifact whose weights the model starts from.

    Raises:
        GuardError: something else than the declared parameters changed; nothing is stored.
        TrainingError: the loss was no longer finite (what was best before is stored under another name), or the
            store could not be written (the checkpoint stays).
    """
    loggers = build_loggers(
        config.logger,
        directory=run.directory,
        name=stage_name(config, [source.name for source in sources]),
        group=run.group,
        job_type=run.command,
        tags=_tags(config, tag),
        config_values=run.config,
        checkpoints=entry.checkpoints,
        identity=entry.identity,
    )
    if run.rank_zero and not config.trainer.barebones:  # which takes no logger at all
        run_name = entry.checkpoints.name
        loggers.append(History(run.directory, run=run_name, name=entry.name, command=run.command))
    watcher = AttentionRecorder(
        [source.name for source in sources], run.directory, lambda record: log_attention(loggers, record)
    )

    def prepare(device: torch.device) -> str | None:
        splits = [*rows.training, *rows.validation.values()]
        once = bool(config.trainer.fast_dev_run) or config.trainer.max_epochs == 1 or not model.trainable()
        features = cache_features(
            model, splits, config.backbone, backbone.fingerprint, device, config.data.cache_dir, once
        )
        if config.compile:  # after the features, which are computed once and not worth it
            compile_layers(backbone.family.layer_list(backbone.model))
        return features

    origin = circumstances() if run.rank_zero else {}  # before hours in which the checkout may change
    if initial is not None:
        origin["init_from"] = {"name": initial.name, "hash": initial.hash}
    if (tracked := run_reference(loggers)) is not None:
        origin["wandb"] = tracked
    exit_code = 1
    try:
        fitted = fit(
            config,
            model,
            rows.training,
            rows.validation,
            loss_weights or {},
            loggers,
            entry.checkpoints,
            backbone.tokenizer_hash,
            prepare=prepare,
            robust_drop=robust_drop,
            temperature=temperature,
            watchers=[watcher],
        )
        if not run.rank_zero:
            return {}
        result = _result(config, entry, model, backbone, fitted, sources)
        manifest = Manifest.of(
            kind=entry.kind,
            name=entry.name,
            task=dataclasses.asdict(config.task_list[0]),
            method=method,
            adapter=adapter,
            composition=composition,
            sources=[{"name": source.name, "hash": source.hash} for source in sources],
            metrics=fitted.metrics,
            seed=config.seed,
            versions=versions(),
            result=result,
            **_circumstances(config, run, entry, model, backbone, rows, origin, fitted.decisions),
        )
        if config.trainer.fast_dev_run:
            log.info("trainer.fast_dev_run: it runs; nothing is stored")
            exit_code = 0
            return result
        if fitted.broken is not None:
            kept = _store(manifest.changed(name=f"{entry.name}{DIVERGED}"), model, entry, True)
            scores = "  ".join(f"{split} {fitted.metrics[split]}" for split in fitted.metrics)
            raise TrainingError(
                f"{fitted.broken}\nThe best epoch before it ({fitted.best_epoch}: {scores}) is kept as {kept.name}"
            )
        path = _store(manifest, model, entry, config.overwrite)
        log.info("stored %s", path)
        if fitted.diverged is not None:
            log.warning(
                "the training diverged: %s. What is stored is epoch %d, the best one; lower optim.lr, or raise "
                "optim.warmup",
                shown(fitted.diverged),
                fitted.best_epoch,
            )
        for name, decision in fitted.decisions.items():
            for key, value in decision.items():
                log.info("%s: %s %.4f, chosen on the validation split and stored", name, key, value)
        stored = read_folder(path)
        result = result_of(stored, path)
        seen = {split: outcomes(rows.validation[split], said) for split, said in fitted.predicted.items()}
        write_outcomes(run.directory, seen)
        log_result(loggers, result)
        log_lineage(
            loggers,
            folder=path,
            kind=stored.kind,
            name=stored.name,
            hash=stored.hash,
            sources=[_reference(source) for source in sources],
            init_from=None if initial is None else _reference(initial),
        )
        exit_code = 0
        return result
    finally:
        finish(loggers, exit_code)


def _reference(manifest: Manifest) -> dict[str, Any]:
    return {"name": manifest.name, "hash": manifest.hash, "run": manifest.run.wandb}


def _store(manifest: Manifest, model: AdaptedModel, entry: RunOutput, overwrite: bool) -> Path:
    try:
        return save(entry.store, manifest, model.weight_state(), model.head_state(), overwrite)
    except OSError as error:
        raise TrainingError(
            f"{entry.store / manifest.name} cannot be written ({error.strerror or error}).\n"
            f"Make room or fix the folder, then run the same command again: {entry.outlook}"
        ) from error


def _circumstances(
    config: StageConfig,
    run: Run,
    entry: RunOutput,
    model: AdaptedModel,
    backbone: Backbone,
    rows: TaskRows,
    origin: dict[str, Any],
    decisions: Mapping[str, Decision],
) -> dict[str, Any]:
    """What the weights were trained in: backbone, head, data and run, as the manifest has them."""
    tasks = config.task_list
    train = {split_name(tasks, encoded.task, "train"): encoded for encoded in rows.training}
    splits = {**train, **rows.validation}
    every = model.head.by_task().values() if isinstance(model.head, TaskHeads) else [model.head]
    heads = [_described(head, decisions.get(str(task.name))) for head, task in zip(every, tasks, strict=True)]
    return {
        "backbone": {
            "name_or_path": config.backbone.name_or_path,
            "revision": config.backbone.revision,
            "fingerprint": backbone.fingerprint,
            "family": backbone.family.name,
            "hidden_size": backbone.hidden_size,
            "layers": backbone.layers,
            "tokenizer": backbone.tokenizer_hash,
            **({"trust_remote_code": True} if config.backbone.trust_remote_code else {}),
        },
        "head": heads[0],
        "multitask": {
            str(task.name): {"task": dataclasses.asdict(task), "head": head}
            for task, head in zip(tasks, heads, strict=True)
        }
        if len(tasks) > 1
        else None,
        "data": {
            "max_length": config.data.max_length,
            "fingerprints": {split: encoded.fingerprint for split, encoded in splits.items()},
            "labels": rows.labels,
        },
        "run": {
            "identity": entry.identity,
            "config": entry.config,
            "overrides": list(run.overrides),
            "directory": str(run.directory),
            **({} if backbone.stamp is None else {STAMP: backbone.stamp}),
            **origin,
        },
    }


def _described(head: TaskHead, decision: Decision | None) -> dict[str, Any]:
    return {
        "pooling": head.pooling,
        "layers": 1 if head.dense is None else 2,
        "outputs": head.output.out_features,
        "dropout": head.dropout.p,
        **({"decision": decision} if decision else {}),
    }


def _result(
    config: StageConfig,
    entry: RunOutput,
    model: AdaptedModel,
    backbone: Backbone,
    fitted: Fit,
    sources: Sequence[Manifest],
) -> dict[str, Any]:
    trainable = sum(parameter.numel() for parameter in model.trainable().values())
    state = model.state_dict(keep_vars=True).keys()  # what belongs to no state_dict is computed, not learnt
    frozen = sum(tensor.numel() for name, tensor in model.frozen().items() if name in state)
    return {
        "stage": 2 if entry.kind == "fusion" else 1,
        "task": "+".join(str(task.name) for task in config.task_list),
        "name": config.name,
        "seed": config.seed,
        "backbone": {"name": config.backbone.name_or_path, "fingerprint": backbone.fingerprint},
        "metrics": fitted.metrics,
        "best_epoch": fitted.best_epoch,
        "epochs": fitted.epochs,
        "parameters": {"trainable": trainable, "frozen": frozen},
        "speed": fitted.speed,
        "sources": [source.name for source in sources],
        **({} if fitted.diverged is None else {"diverged": fitted.diverged}),
    }


def _tags(config: StageConfig, tag: str) -> list[str]:
    names = [str(task.name) for task in config.task_list]
    return [*names, config.backbone.name_or_path.rsplit("/", 1)[-1], tag]

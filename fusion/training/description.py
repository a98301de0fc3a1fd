"""The manifest and the result of a training."""

from __future__ import annotations

import dataclasses
from typing import Any

from fusion.backbones.files import STAMP
from fusion.layers.heads import TaskHead, TaskHeads
from fusion.runs.provenance import versions
from fusion.store.manifest import Manifest
from fusion.tasks.kind import Decision
from fusion.training.fit import Fit
from fusion.training.spec import StageSpec
from fusion.training.task_rows import split_name


def result_of_fit(spec: StageSpec, fitted: Fit) -> dict[str, Any]:
    """The content of result.json, except what is known once the artifact is stored."""
    config, model = spec.config, spec.model
    trainable = sum(parameter.numel() for parameter in model.trainable().values())
    state = model.state_dict(keep_vars=True).keys()  # buffers outside it are computed, not learned
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


def manifest_of_fit(spec: StageSpec, fitted: Fit, result: dict[str, Any], origin: dict[str, Any]) -> Manifest:
    """
    Args:
        origin: when and where the run started, its W&B run and initial artifact.
    """
    config, run, output, backbone = spec.config, spec.run, spec.output, spec.backbone
    tasks = config.task_list
    described = [dataclasses.asdict(task) for task in tasks]
    modules = spec.model.head.by_task().values() if isinstance(spec.model.head, TaskHeads) else [spec.model.head]
    heads = [_head(head, fitted.decisions.get(str(task.name))) for head, task in zip(modules, tasks, strict=True)]
    multitask = {
        str(task.name): {"task": values, "head": head}
        for task, values, head in zip(tasks, described, heads, strict=True)
    }
    train = {split_name(tasks, encoded.task, "train"): encoded for encoded in spec.rows.training}
    splits = {**train, **spec.rows.validation}
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
        backbone={
            "name_or_path": config.backbone.name_or_path,
            "revision": config.backbone.revision,
            "fingerprint": backbone.fingerprint,
            "family": backbone.family.name,
            "hidden_size": backbone.hidden_size,
            "layers": backbone.layers,
            "tokenizer": backbone.tokenizer_hash,
            **({"trust_remote_code": True} if config.backbone.trust_remote_code else {}),
        },
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


def _head(head: TaskHead, decision: Decision | None) -> dict[str, Any]:
    return {
        "pooling": head.pooling,
        "layers": 1 if head.dense is None else 2,
        "outputs": head.output.out_features,
        "dropout": head.dropout.p,
        **({"decision": decision} if decision else {}),
    }

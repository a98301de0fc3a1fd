"""Training that starts from the weights of a stored artifact: `init_from=NAME`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fusion.backbones.load import Backbone
from fusion.config.stages import StageConfig
from fusion.config.task import TaskConfig
from fusion.layers.heads import TaskHead, TaskHeads
from fusion.model.adapted import AdaptedModel
from fusion.model.build import check_made_for
from fusion.store.artifacts import copy_stored, load
from fusion.store.layout import HEAD, WEIGHTS
from fusion.store.manifest import Manifest

log = logging.getLogger(__name__)


def start_from(config: StageConfig, model: AdaptedModel, backbone: Backbone) -> Manifest | None:
    """Copy the weights of the artifact that `init_from` names into the model, and its head where that fits.

    Returns:
        The manifest of the artifact; None: `init_from` names none.

    Raises:
        UserError: it is damaged, or was trained on another backbone.
    """
    if config.init_from is None:
        return None
    artifact = load(config.init_from, Path(config.store))
    manifest = artifact.manifest
    check_made_for(artifact, backbone)
    copy_stored(model.weight_state(), artifact.weights, artifact.path / WEIGHTS)
    if _head_fits(config, manifest, model):
        copy_stored(model.head_state(), artifact.head, artifact.path / HEAD)
        log.info("starting from the weights and the head of %s", manifest.name)
    else:
        log.info(
            "starting from the weights of %s; the head is new, since its task or shape differs", manifest.name
        )
    return manifest


def _head_fits(config: StageConfig, manifest: Manifest, model: AdaptedModel) -> bool:
    """Whether the stored head has this shape and answers tasks of the same kind and labels."""
    heads = model.head.by_task() if isinstance(model.head, TaskHeads) else {"": model.head}
    described = {"": (manifest.task, manifest.head)}
    if manifest.multitask is not None:
        described = {name: (one.task, one.head) for name, one in manifest.multitask.items()}
    tasks = config.task_list
    names = [str(task.name) for task in tasks] if len(tasks) > 1 else [""]
    if list(described) != names or list(heads) != names:
        return False
    return all(
        (described[name][0].kind, described[name][0].labels) == (task.kind, task.labels)
        and _head_shape(heads[name])
        == tuple(getattr(described[name][1], key) for key in ("pooling", "layers", "outputs"))
        for name, task in zip(names, tasks, strict=True)
    )


def _answers(task: dict[str, Any]) -> tuple[Any, Any]:
    read = TaskConfig.from_dict(task, where="init_from")
    return read.kind, read.labels


def _head_shape(head: TaskHead) -> tuple[str, int, int]:
    return head.pooling, 1 if head.dense is None else 2, head.output.out_features

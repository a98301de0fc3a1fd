"""Training that starts from the weights of a stored artifact: `init_from=NAME`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from fusion.backbones.load import Backbone
from fusion.config.stages import StageConfig
from fusion.config.task import TaskConfig
from fusion.layers.heads import TaskHeads
from fusion.model.adapted import AdaptedModel
from fusion.model.build import check_made_for
from fusion.store.artifacts import copy_stored, load
from fusion.store.layout import HEAD, WEIGHTS
from fusion.store.manifest import Manifest

log = logging.getLogger(__name__)


def start_from(config: StageConfig, model: AdaptedModel, backbone: Backbone) -> Manifest | None:
    """Copy the weights of the artifact that `init_from` names into the model, and its head if it fits.

    Returns:
        The manifest of the artifact; None: `init_from` is not set.

    Raises:
        UserError: it is damaged, or was trained on another backbone.
    """
    if config.init_from is None:
        return None
    artifact = load(config.init_from, Path(config.store))
    manifest = artifact.manifest
    check_made_for(artifact, backbone)
    copy_stored(model.weight_state(), artifact.weights, artifact.path / WEIGHTS)
    if _head_fits(config.task_list, manifest, model):
        copy_stored(model.head_state(), artifact.head, artifact.path / HEAD)
        log.info("starting from the weights and the head of %s", manifest.name)
    else:
        log.info("starting from the weights of %s; the head is new, since its task or shape differs", manifest.name)
    return manifest


def _head_fits(tasks: Sequence[TaskConfig], manifest: Manifest, model: AdaptedModel) -> bool:
    """Whether the stored heads have the model's shapes, and tasks of the same kinds and labels."""
    heads = list(model.head.by_task().values()) if isinstance(model.head, TaskHeads) else [model.head]
    stored = list(zip(manifest.tasks, manifest.heads, strict=True))
    multitask = len(tasks) > 1 or manifest.multitask is not None
    if multitask and [task.name for task in manifest.tasks] != [task.name for task in tasks]:
        return False
    return len(stored) == len(tasks) and all(
        (before.kind, before.labels) == (task.kind, task.labels)
        and (shape.pooling, shape.layers, shape.outputs)
        == (head.pooling, 1 if head.dense is None else 2, head.output.out_features)
        for (before, shape), task, head in zip(stored, tasks, heads, strict=True)
    )

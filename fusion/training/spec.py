"""The arguments of `fit` and `train_and_store`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger

from fusion.backbones.load import Backbone
from fusion.config.data import DataConfig
from fusion.config.stages import StageConfig
from fusion.config.task import TaskConfig
from fusion.config.training import OptimConfig, TrainerConfig
from fusion.model.adapted import AdaptedModel
from fusion.runs.output import RunOutput
from fusion.runs.run import Run
from fusion.store.manifest import Manifest
from fusion.training.task_rows import TaskRows


@dataclass(frozen=True)
class Objective:
    """
    Attributes:
        loss_weights: of the named terms that the model adds to the loss.
        label_smoothing: as in `torch.nn.CrossEntropyLoss`.
        robust_drop: whether each batch skips a random number of the first layers' slots.
        temperature: of multi-task sampling, see `TaskBatches`.
    """

    loss_weights: dict[str, float] = field(default_factory=dict)
    label_smoothing: float = 0.0
    robust_drop: bool = False
    temperature: float = 1.0


@dataclass(frozen=True)
class FitSpec:
    """
    Attributes:
        tasks: in the order in which the rows number them.
        checkpoints: the folder from which an interrupted training resumes.
        checkpoint_minutes: between two checkpoints within an epoch; None: none there.
        tokenizer: its hash; a run resumes with the same one only.
        callbacks: observe only.
        prepare: called with the device before anything runs there; returns the type of the cached frozen features in
            the batches from then on, see `fusion.model.feature_cache`, or None.
    """

    tasks: Sequence[TaskConfig]
    rows: TaskRows
    data: DataConfig
    optim: OptimConfig
    trainer: TrainerConfig
    checkpoints: Path
    seed: int
    objective: Objective = field(default_factory=Objective)
    resume: bool = True
    checkpoint_minutes: float | None = None
    tokenizer: str | None = None
    loggers: Sequence[Logger] = ()
    callbacks: Sequence[Callback] = ()
    prepare: Callable[[torch.device], str | None] = lambda device: None


@dataclass(frozen=True)
class StageSpec:
    """
    Attributes:
        tag: of the run in W&B: the method of stage 1, the composition of stage 2.
        parts: `method`, `adapter` or `composition` of the manifest.
        sources: of a fusion, in order.
        initial: the artifact whose weights the model starts from.
    """

    config: StageConfig
    run: Run
    output: RunOutput
    model: AdaptedModel
    backbone: Backbone
    rows: TaskRows
    tag: str
    parts: Mapping[str, dict[str, Any] | None]
    objective: Objective
    sources: Sequence[Manifest] = ()
    initial: Manifest | None = None

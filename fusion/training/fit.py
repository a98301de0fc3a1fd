"""Train a model: what both stages share."""

from __future__ import annotations

import dataclasses
import logging
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import AdvancedProfiler, SimpleProfiler
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from fusion.config.training import TrainerConfig
from fusion.data.batches import EpochBatches, TaskBatches
from fusion.data.loaders import evaluation_loader, training_loader
from fusion.errors import LossNotFinite, TrainingError, UserError
from fusion.model.adapted import AdaptedModel
from fusion.runs.memory import keep_freed_memory
from fusion.store.artifacts import copy_into
from fusion.tasks.kind import Decision
from fusion.text import shows_progress
from fusion.training import lightning_internals as internals
from fusion.training.callbacks import Best, EpochLine, StepTimer, best_epoch
from fusion.training.checkpoints import LAST, Checkpoints, Loaded, check_tokenizer, read_checkpoint
from fusion.training.divergence import divergence
from fusion.training.expected_warnings import ignore_expected_warnings
from fusion.training.guard import Guard
from fusion.training.history import FirstOfEpoch
from fusion.training.interrupts import Interrupts
from fusion.training.metrics import main_metric
from fusion.training.module import TaskModule
from fusion.training.out_of_memory import OutOfMemory
from fusion.training.predictions import RowPredictions
from fusion.training.progress import ProgressBar
from fusion.training.spec import FitSpec

log = logging.getLogger(__name__)

PROFILERS: dict[str, type[AdvancedProfiler | SimpleProfiler]] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}


@dataclass(frozen=True)
class Fit:
    """The outcome of a training; the model has the best epoch's weights by then.

    Attributes:
        metrics: of the best epoch, by split.
        best_epoch: counted from 1; 0 if nothing was trained.
        speed: seconds of the whole fit (with validation) and of a step (the median), examples and tokens (with padding)
            trained per second, peak memory in bytes, and joules if the machine counts them.
        predicted: by split, with the best epoch's weights.
        decisions: of the predictions, by task, see `Kind.decision`.
        broken: why the training stopped with a loss that is not finite; None: it did not.
        diverged: see `fusion.training.divergence`.
    """

    metrics: dict[str, dict[str, float]]
    best_epoch: int
    epochs: int
    speed: dict[str, float | None]
    predicted: dict[str, RowPredictions]
    decisions: dict[str, Decision]
    broken: str | None = None
    diverged: dict[str, float] | None = None


def fit(model: AdaptedModel, spec: FitSpec) -> Fit:
    """Train until the last epoch or early stopping, and load the best epoch's weights into the model.

    The first metric of the first validation split selects the best epoch, with multiple tasks their mean. A model without
    trainable parameters is validated once.

    Raises:
        GuardError: something else than the declared parameters would train, or changed.
        TrainingError: the loss or a weight is no longer finite, or memory ran out.
        UserError: the trainer's settings do not fit the data, or the checkpoint does not fit the run.
    """
    keep_freed_memory()
    splits = {name: spec.tasks[rows.task] for name, rows in spec.rows.validation.items()}
    monitor = main_metric(splits)
    interrupts, timer = Interrupts(), StepTimer()
    best = Best(monitor, spec.optim.patience)
    memory = OutOfMemory(spec.data, spec.trainer, model.gradient_checkpointing)
    writes = spec.trainer.enable_checkpointing and not spec.trainer.fast_dev_run
    # The guard is first, so that nothing stores what it refuses; checkpoints are last.
    callbacks: list[Callback] = [
        Guard(model, spec.checkpoints),
        memory,
        best,
        EpochLine(monitor),
        timer,
        *spec.callbacks,
        FirstOfEpoch(),
        *([ProgressBar(monitor)] if spec.trainer.enable_progress_bar and shows_progress() else []),
        Checkpoints(spec.checkpoints if writes else None, spec.checkpoint_minutes, interrupts, spec.tokenizer),
    ]
    last = read_checkpoint(spec.checkpoints) if spec.resume and model.trainable() else None
    if last is not None:
        check_tokenizer(last, spec.tokenizer)
    trainer = make_trainer(spec.trainer, callbacks, list(spec.loggers), last)
    module = TaskModule(
        model,
        spec.tasks,
        spec.optim,
        spec.objective.loss_weights,
        splits,
        spec.prepare(trainer.strategy.root_device),
        spec.seed,
        spec.objective.robust_drop,
        [rows.class_weights for rows in spec.rows.training],
        spec.objective.label_smoothing,
    )
    batches, evaluation = _loaders(spec, trainer)
    _check_interval(spec.trainer, len(batches))
    if last is not None:
        _resume(batches, last["position"], spec.trainer.max_epochs or 1)
    module.count_time()
    broken = None
    with memory.explained():
        if model.trainable():
            try:
                with interrupts:
                    path = None if last is None else str(spec.checkpoints / LAST)
                    trainer.fit(module, batches, evaluation, ckpt_path=path, weights_only=True)
            except LossNotFinite as error:
                broken = f"{error}: training stopped.\nLower optim.lr, or raise optim.warmup"
                if not module.history:
                    raise TrainingError(broken) from error
        if not module.history:  # nothing trains, or max_steps or max_time ended it within the first epoch
            trainer.validate(module, evaluation, verbose=False)
    speed = _speed(module, trainer.world_size, timer)
    diverged = divergence(module.epoch_loss.figures(), spec.rows.training, spec.tasks)
    scores = best_epoch(module.history, monitor)
    if trainer.is_global_zero:  # the others store nothing
        if spec.trainer.profiler in PROFILERS:
            for table in sorted(Path(spec.trainer.default_root_dir or ".").glob("fit-profile*.txt"))[:1]:
                log.info("profile of the training: %s", table)
        if not model.trainable():
            shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "epoch")
            log.info("nothing trains  %s  %.1f s", shown, speed["seconds"])
        if best.weights is not None:
            copy_into(model.trainable(), best.weights, spec.checkpoints)
        _check_finite(model)
    source = module if best.weights is None else best
    return Fit(
        metrics={split: {m: scores[f"{split}/{m}"] for m in task.metrics} for split, task in splits.items() if scores},
        best_epoch=int(scores.get("epoch", 0)) if model.trainable() else 0,
        epochs=internals.epochs_done(trainer),
        speed=speed,
        predicted=source.predicted,
        decisions=source.decisions,
        broken=broken,
        diverged=diverged,
    )


def _loaders(spec: FitSpec, trainer: lightning.Trainer) -> tuple[DataLoader[Any], list[DataLoader[Any]]]:
    """Of the training and of each validation split."""
    size = spec.data.batch_size
    options: dict[str, Any] = {
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "workers": spec.data.workers,
        "tokens_per_batch": spec.data.tokens_per_batch,
    }
    evaluation = [evaluation_loader(rows, size, **options) for rows in spec.rows.validation.values()]
    training = spec.rows.training
    temperature = spec.objective.temperature
    batches = training_loader(training, size, spec.seed, temperature=temperature, **options)
    if len(spec.tasks) > 1:
        shares = cast(TaskBatches, batches.sampler).shares
        shown = ", ".join(f"{task.name} {share:.1%}" for task, share in zip(spec.tasks, shares, strict=True))
        log.info("%d batches an epoch, each of one task: %s", len(batches), shown)
    return batches, evaluation


def _check_interval(trainer: TrainerConfig, batches: int) -> None:
    interval = trainer.val_check_interval
    if type(interval) is int and interval > batches and trainer.check_val_every_n_epoch is not None:
        raise UserError(
            f"trainer.val_check_interval={interval}: an epoch has {batches} batches; expected at most that, "
            "a fraction of it, or trainer.check_val_every_n_epoch=null"
        )


def _resume(batches: DataLoader[Any], position: dict[str, int], max_epochs: int) -> None:
    epoch, batch = position["epoch"], position["batch"]
    cast(EpochBatches, batches.sampler).resume(epoch, batch)
    over = epoch >= max_epochs
    where = "after the last epoch" if over else f"at epoch {epoch + 1}, batch {batch + 1}"
    log.info("resuming %s", where)


def _speed(module: TaskModule, world_size: int, timer: StepTimer) -> dict[str, float | None]:
    seconds, joules = module.spent()
    return {
        "seconds": seconds,
        "seconds_per_step": timer.median(),
        "examples_per_second": module.rows_seen * world_size / seconds,
        "tokens_per_second": module.tokens_seen * world_size / seconds,
        "peak_memory_bytes": _peak_memory(),
        **({} if joules is None else {"energy_joules": joules}),
    }


def make_trainer(
    config: TrainerConfig, callbacks: list[Callback], loggers: list[Logger], last: dict[str, Any] | None = None
) -> lightning.Trainer:
    """Lightning's Trainer, without its distributed samplers and checkpoints, which this package replaces.

    Args:
        last: the checkpoint that the training resumes from.

    Raises:
        UserError: Lightning refuses a value.
    """
    arguments: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    arguments["enable_checkpointing"] = False
    plugins: list[Any] = [] if last is None else [Loaded(last)]
    arguments["enable_progress_bar"] = any(isinstance(callback, ProgressBar) for callback in callbacks)
    if config.profiler in PROFILERS:  # given by name, Lightning logs its table at a level that is not shown
        folder = config.default_root_dir or "."
        arguments["profiler"] = PROFILERS[config.profiler](dirpath=folder, filename="profile")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its tips
    ignore_expected_warnings()
    try:
        trainer = lightning.Trainer(
            **arguments,
            callbacks=callbacks,
            logger=loggers or False,
            plugins=plugins or None,
            use_distributed_sampler=False,
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    internals.leave_signals_alone(trainer)
    return trainer


def _check_finite(model: AdaptedModel) -> None:
    broken = [name for name, parameter in model.trainable().items() if not parameter.isfinite().all()]
    if broken:
        raise TrainingError(
            f"{broken[0]} and {len(broken) - 1} more have values that are not finite; nothing is stored.\n"
            "Lower optim.lr, or raise optim.warmup"
        )


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

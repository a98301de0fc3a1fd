"""The `fit` function: train a model with the settings of a stage."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import AdvancedProfiler, SimpleProfiler
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from fusion.config.stages import StageConfig
from fusion.config.training import LossConfig, OptimConfig, TrainerConfig
from fusion.data.batches import EpochBatches, TaskBatches
from fusion.data.loaders import evaluation_loader, largest_batch, training_loader
from fusion.errors import LossNotFinite, TrainingError, UserError, first_line
from fusion.model.adapted import AdaptedModel
from fusion.runs.memory import GLIBC_OVERHEAD, collect_as_usual, keep_freed_memory, return_freed_memory
from fusion.store.artifacts import copy_into
from fusion.tasks.kind import Decision
from fusion.text import shows_progress
from fusion.training import lightning_internals as internals
from fusion.training.callbacks import Best, EpochLine, OutOfMemory, ProgressBar, Speed
from fusion.training.checkpoints import LAST, Checkpoints, Interrupts, Loaded, check_tokenizer, read_checkpoint
from fusion.training.expected_warnings import ignore_expected_warnings
from fusion.training.frozen_weights import FrozenWeights
from fusion.training.guard import Guard
from fusion.training.losses import divergence, not_learned
from fusion.training.memory import Memory, available, expected_memory, in_bytes
from fusion.training.module import Objective, TaskModule
from fusion.training.predictions import RowPredictions, main_metric
from fusion.training.records import FirstOfEpoch
from fusion.training.task_rows import TaskRows

log = logging.getLogger(__name__)

EVALUATIONS = 10  # of a run with more than `optim.epochs` epochs, at least
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
PROFILERS: dict[str, type[AdvancedProfiler | SimpleProfiler]] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}


@dataclass(frozen=True)
class Fit:
    """Result of a training run. On return, the model has the weights of the best epoch."""

    metrics: dict[str, dict[str, float]]  # of the best epoch, by split
    best_epoch: int  # one-based, or 0 if nothing was trained
    epochs: int
    speed: dict[str, float | None]  # see `Speed.result`
    predicted: dict[str, RowPredictions]  # in the best epoch, by split
    decisions: dict[str, Decision]  # decision parameters of the predictions, by task, see `Kind.decision`
    broken: str | None = None  # error message if training stopped because the loss was not finite
    diverged: dict[str, float] | None = None  # see `divergence`
    not_learned: dict[str, Any] = field(default_factory=dict)  # see `fusion.training.losses.not_learned`


@dataclass(frozen=True)
class FitSpec:
    """What `fit` trains, and how."""

    model: AdaptedModel
    config: StageConfig
    rows: TaskRows
    objective: Objective
    checkpoints: Path  # directory from which an interrupted run resumes
    tokenizer: str | None = None  # hash; a run can only resume with the same tokenizer
    loggers: Sequence[Logger] = ()
    callbacks: Sequence[Callback] = ()  # must not change the model
    # Called with the device before anything runs on it; returns the type of the cached frozen features that batches
    # then contain, see `fusion.model.feature_cache`, or `None`.
    prepare: Callable[[torch.device], str | None] = lambda device: None


def fit(spec: FitSpec) -> Fit:
    """Train until the last epoch or early stopping, and load the best epoch's weights into the model.

    The best epoch is selected by the first metric on the first validation split, averaged over tasks, among
    those from `optim.min_steps` on. A model without trainable parameters is only validated.

    Raises:
        GuardError: if a parameter that is not declared trainable would be trained or has changed.
        TrainingError: if the loss or a weight is no longer finite, or memory runs out.
        UserError: if the trainer settings are incompatible with the data, or the checkpoint with the run.
    """
    model, config, rows, objective, checkpoints = spec.model, spec.config, spec.rows, spec.objective, spec.checkpoints
    overhead = GLIBC_OVERHEAD if keep_freed_memory() else 1.0
    collect_as_usual()
    tasks, settings = config.task_list, config.trainer
    splits = {name: tasks[split.task] for name, split in rows.validation.items()}
    monitor = main_metric(splits)
    interrupts, speed = Interrupts(), Speed()
    planned = settings.max_epochs is None and not settings.fast_dev_run
    best = Best(monitor, config.optim.patience)
    memory = OutOfMemory(config.data, settings, model.gradient_checkpointing)
    folder = checkpoints if settings.enable_checkpointing and not settings.fast_dev_run else None
    last = read_checkpoint(checkpoints) if config.resume and model.trainable() else None
    if last is not None:
        check_tokenizer(last, spec.tokenizer)
    bar = [ProgressBar(best)] if settings.enable_progress_bar and shows_progress() else []
    last_callback = Checkpoints(folder, config.checkpoint_minutes, interrupts, spec.tokenizer)
    # The guard comes first, so that no callback saves weights that fail its checks; checkpoints come last.
    first = [Guard(model, checkpoints), FrozenWeights(model, settings.shards), memory, best, EpochLine(best), speed]
    callbacks = [*first, *spec.callbacks, FirstOfEpoch(), *bar, last_callback]
    trainer = make_trainer(settings, callbacks, list(spec.loggers), last)
    device = trainer.strategy.root_device
    features = spec.prepare(device)
    weights = [split.class_weights for split in rows.training]
    module = TaskModule(model, tasks, config.optim, objective, splits, features, config.seed, weights)
    batches, evaluation = _loaders(config, rows, objective.temperature, trainer)
    if planned:
        epochs, every, best.min_epochs = planned_epochs(config.optim, settings, len(batches))
        internals.set_epochs(trainer, epochs, every)
        if epochs > config.optim.epochs:
            log.info(
                "%d epochs of %d batches, for optim.min_steps=%d; evaluated every %s",
                *(epochs, len(batches), config.optim.min_steps, "epoch" if every == 1 else f"{every} epochs"),
            )
    if last is not None:
        epoch, batch = last["position"]["epoch"], last["position"]["batch"]
        cast(EpochBatches, batches.sampler).resume(epoch, batch)
        done = epoch >= (trainer.max_epochs or 1)
        log.info("resuming %s", "after the last epoch" if done else f"at epoch {epoch + 1}, batch {batch + 1}")
    if (trained := model.trainable()) and trainer.is_global_zero:
        log.info("%s trainable parameters", f"{sum(parameter.numel() for parameter in trained.values()):,}")
    return_freed_memory()  # the peak is measured from now on
    speed.start(device)
    if model.trainable() and not settings.shards:
        with trainer.precision_plugin.forward_context():
            speed.expected = _expected_memory(config, model, batches, device, features is not None, overhead)
    broken = None
    with memory.explained():
        if model.trainable():
            try:
                with interrupts:
                    path = None if last is None else str(checkpoints / LAST)
                    trainer.fit(module, batches, evaluation, ckpt_path=path, weights_only=True)
            except LossNotFinite as error:
                broken = f"{error}: training stopped.\nLower optim.lr or increase optim.warmup"
                if not module.history:
                    raise TrainingError(broken) from error
        if not module.history:  # nothing is trainable, or max_steps or max_time was reached in the first epoch
            trainer.validate(module, evaluation, verbose=False)
    measured = speed.result(trainer.world_size)
    figures = module.epoch_loss.figures()
    diverged = divergence(figures, rows.training, tasks)
    scores = best.epoch(module.history)
    if trainer.is_global_zero:
        if speed.expected is not None or settings.shards:
            log.info("peak memory %s", in_bytes(int(measured["peak_memory_bytes"] or 0)))
        if settings.profiler in PROFILERS:
            for table in sorted(Path(settings.default_root_dir or ".").glob("fit-profile*.txt"))[:1]:
                log.info("profiler output: %s", table)
        if not model.trainable():
            shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "epoch")
            log.info("no trainable parameters  %s  %.1f s", shown, measured["seconds"])
        if best.weights is not None:
            copy_into(model.trainable(), best.weights, checkpoints)
        _check_finite(model)
    source = module if best.weights is None else best
    plain = len(tasks) == 1 and config.loss == LossConfig() and objective.sampling is None
    firsts = [next(name for name, split in rows.validation.items() if split.task == n) for n in range(len(tasks))]
    unlearned = {}
    if scores and model.trainable() and diverged is None and broken is None:
        labels = {name: source.predicted[name].labels for name in firsts}
        unlearned = not_learned(figures if plain else None, rows.training, tasks, scores, labels)
    return Fit(
        metrics={split: {m: scores[f"{split}/{m}"] for m in task.metrics} for split, task in splits.items() if scores},
        best_epoch=int(scores.get("epoch", 0)) if model.trainable() else 0,
        epochs=internals.epochs_done(trainer),
        speed=measured,
        predicted=source.predicted,
        decisions=source.decisions,
        broken=broken,
        diverged=diverged,
        not_learned=unlearned,
    )


def planned_epochs(optim: OptimConfig, trainer: TrainerConfig, batches: int) -> tuple[int, int | None, float]:
    """Return the number of epochs, after how many of them the model is evaluated, and the epochs of `optim.min_steps`.

    There are `optim.epochs`, or as many as it takes to train `optim.min_steps` (or, if it is set, `trainer.max_steps`)
    optimizer steps. With more than `optim.epochs`, the model is evaluated at most that many times, or ten times if that
    is more, since a small training split may come with a large validation split.
    """
    limit = trainer.limit_train_batches
    if limit is not None:
        batches = min(batches, limit) if type(limit) is int else int(batches * limit)
    steps = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    epochs = max(optim.epochs, math.ceil(max(optim.min_steps, trainer.max_steps) / steps))
    least = optim.min_steps / steps
    if trainer.check_val_every_n_epoch != 1 or trainer.val_check_interval is not None:
        return epochs, trainer.check_val_every_n_epoch, least
    every = 1 if epochs == optim.epochs else math.ceil(epochs / max(optim.epochs, EVALUATIONS))
    return math.ceil(epochs / every) * every, every, least


def _expected_memory(
    config: StageConfig,
    model: AdaptedModel,
    batches: DataLoader[Any],
    device: torch.device,
    cached: bool,
    overhead: float,
) -> Memory | None:
    """Estimate and log the memory of the training; `None` if the backbone does not run on the tokens of the estimate."""
    limit = config.trainer.limit_train_batches
    shape = largest_batch(batches, limit if type(limit) is int else None)
    try:
        expected = expected_memory(model, shape, device, cached, overhead)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        log.info("expected memory unknown (%s)", first_line(error))
        return None
    log.info("expected memory %s", expected)
    free = available(device)
    if free is not None and expected.total > free:
        key = "batch_size" if config.data.tokens_per_batch is None else "tokens_per_batch"
        log.warning(
            "only %s is available: lower data.%s, or set backbone.gradient_checkpointing=true", in_bytes(free), key
        )
    return expected


def _loaders(
    config: StageConfig, rows: TaskRows, temperature: float, trainer: lightning.Trainer
) -> tuple[DataLoader[Any], list[DataLoader[Any]]]:
    """Return the training loader and one loader per validation split."""
    data, tasks = config.data, config.task_list
    options = trainer.global_rank, trainer.world_size, data.workers, data.tokens_per_batch
    evaluation = [evaluation_loader(split, data.batch_size, *options) for split in rows.validation.values()]
    batches = training_loader(rows.training, data.batch_size, config.seed, *options, temperature)
    if len(tasks) > 1:
        shares = cast(TaskBatches, batches.sampler).shares
        shown = ", ".join(f"{task.name} {share:.1%}" for task, share in zip(tasks, shares, strict=True))
        log.info("%d batches per epoch, each from one task: %s", len(batches), shown)
    interval = config.trainer.val_check_interval
    if type(interval) is int and interval > len(batches) and config.trainer.check_val_every_n_epoch is not None:
        raise UserError(
            f"trainer.val_check_interval={interval}: an epoch has only {len(batches)} batches; set a smaller number, "
            "a fraction of an epoch, or trainer.check_val_every_n_epoch=null"
        )
    return batches, evaluation


def make_trainer(
    config: TrainerConfig, callbacks: list[Callback], loggers: list[Logger], last: dict[str, Any] | None = None
) -> lightning.Trainer:
    """Create a Lightning Trainer without distributed samplers and checkpoints, which this package replaces.

    Raises UserError if Lightning rejects a value. `last` is the checkpoint to resume from.
    """
    arguments = config.arguments() | {
        "enable_checkpointing": False,
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in callbacks),
        "callbacks": callbacks,
        "logger": loggers or False,
        "plugins": None if last is None else Loaded(last),
        "use_distributed_sampler": False,
    }
    if config.profiler in PROFILERS:  # if set by name, Lightning logs the table at a level that is not shown
        folder = config.default_root_dir or "."
        arguments["profiler"] = PROFILERS[config.profiler](dirpath=folder, filename="profile")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its tips
    ignore_expected_warnings()
    try:
        trainer = lightning.Trainer(**arguments)
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    internals.leave_signals_alone(trainer)
    return trainer


def _check_finite(model: AdaptedModel) -> None:
    if broken := [name for name, parameter in model.trainable().items() if not parameter.isfinite().all()]:
        raise TrainingError(
            f"{broken[0]} and {len(broken) - 1} more parameters are not finite; no artifact was saved.\n"
            "Lower optim.lr or increase optim.warmup"
        )


def use_deterministic_algorithms(deterministic: bool | str | None) -> None:
    """Apply `trainer.deterministic` before anything runs on a device.

    Lightning applies it when the Trainer is created, which is too late: a probe and the feature cache run earlier, and
    cuBLAS reads its environment variable only once. On a CPU this has no effect.
    """
    if deterministic:
        os.environ.setdefault(CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")

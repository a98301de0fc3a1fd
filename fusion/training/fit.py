"""Train a model on a task: what both stages share."""

from __future__ import annotations

import dataclasses
import logging
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import AdvancedProfiler, SimpleProfiler
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from fusion.config.stages import StageConfig
from fusion.config.training import TrainerConfig
from fusion.data.batches import EpochBatches, TaskBatches
from fusion.data.encode import EncodedRows
from fusion.data.loaders import evaluation_loader, multitask_loader, training_loader
from fusion.errors import LossNotFinite, TrainingError, UserError
from fusion.model.adapted import AdaptedModel
from fusion.runs.memory import keep_freed_memory
from fusion.store.artifacts import copy_into
from fusion.tasks.kind import Decision
from fusion.text import shows_progress
from fusion.training.callbacks import Best, EpochLine, StepClock, best_epoch
from fusion.training.checkpoints import LAST, TOKENIZER, Checkpoints, Loaded, read_checkpoint
from fusion.training.divergence import divergence
from fusion.training.expected_warnings import ignore_expected_warnings
from fusion.training.guard import Guard
from fusion.training.history import FirstOfEpoch
from fusion.training.interrupts import Interrupts
from fusion.training.metrics import main_metric
from fusion.training.module import TaskModule
from fusion.training.out_of_memory import OutOfMemory
from fusion.training.outcomes import Scored
from fusion.training.progress import ProgressBar

log = logging.getLogger(__name__)

PROFILERS: dict[str, type[AdvancedProfiler | SimpleProfiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
}


@dataclass(frozen=True)
class Fit:
    """What a training gave; the model holds the best epoch's weights by then.

    metrics: of the best epoch, by split. best_epoch: counted from 1. speed: seconds of the whole
    fit (evaluation included) and of a step (the median), rows and tokens (padding included) trained
    on per second, bytes, and joules where the machine counts them. predicted: what the best epoch's
    weights say of each row, by split. decisions: what the predictions depend on, by task, see `Kind.decision`. broken: why it ended before its time, with what came
    before it kept; None: it did not. diverged: see `fusion.training.divergence`.
    """

    metrics: dict[str, dict[str, float]]
    best_epoch: int
    epochs: int
    speed: dict[str, float | None]
    predicted: dict[str, Scored]
    decisions: dict[str, Decision]
    broken: str | None = None
    diverged: dict[str, float] | None = None


def fit(
    config: StageConfig,
    model: AdaptedModel,
    training: Sequence[EncodedRows],
    validation: dict[str, EncodedRows],
    loss_weights: dict[str, float],
    loggers: list[Logger],
    checkpoints: Path,
    tokenizer: str | None = None,
    prepare: Callable[[torch.device], str | None] = lambda device: None,
    robust_drop: bool = False,
    temperature: float = 1.0,
    watchers: Sequence[Callback] = (),
) -> Fit:
    """Train until the epochs or the patience end, and leave the best epoch's weights in the model.

    A model in which nothing trains is evaluated, once.

    Args:
        training: a split of each task.
        validation: by split name; the first split's first metric picks the best epoch, of several tasks the mean.
        loss_weights: of the named terms that the model adds to the loss.
        checkpoints: where an interrupted training is taken up again.
        tokenizer: its hash, which a checkpoint keeps: training resumes with the same token ids only.
        prepare: is called with the device before anything runs there; gives the type of the states that the rows
            bring along from then on, see `fusion.model.feature_cache`, or None.
        robust_drop: whether each batch leaves out a random number of the first layers' slots.
        temperature: of several tasks, how they are drawn, see `TaskBatches`.
        watchers: look on and change nothing.

    Raises:
        GuardError: something else than the declared parameters would train, or did.
        TrainingError: the loss or a weight is no longer finite, or memory ran out.
        UserError: the trainer's settings do not fit, among them those that leave nothing to evaluate.
    """
    tasks = config.task_list
    keep_freed_memory()
    splits = {name: tasks[rows.task] for name, rows in validation.items()}
    monitor = main_metric(splits)
    interrupts = Interrupts()
    clock = StepClock()
    best = Best(monitor, config.optim.patience)
    memory = OutOfMemory(config, training, validation.values())
    writes = config.trainer.enable_checkpointing and not config.trainer.fast_dev_run
    keep = Checkpoints(checkpoints if writes else None, config.checkpoint_minutes, interrupts, tokenizer)
    # The guard first, since what it refuses nobody shall write down; what writes comes last.
    callbacks: list[Callback] = [
        Guard(model, checkpoints),
        memory,
        best,
        EpochLine(monitor, config.optim.patience),
        clock,
    ]
    callbacks += [*watchers, FirstOfEpoch()]
    if config.trainer.enable_progress_bar and shows_progress():
        callbacks.append(ProgressBar(monitor))
    callbacks.append(keep)
    last = read_checkpoint(checkpoints) if config.resume and model.trainable() else None
    if last is not None:
        _check_tokenizer(last, tokenizer)
    trainer = make_trainer(config.trainer, callbacks, loggers, last)
    loading: dict[str, Any] = {
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "workers": config.data.workers,
        "tokens_per_batch": config.data.tokens_per_batch,
    }
    features = prepare(trainer.strategy.root_device)
    module = TaskModule(
        model,
        tasks,
        config.optim,
        loss_weights,
        splits,
        features,
        config.seed,
        robust_drop,
        [rows.class_weights for rows in training],
        config.loss.label_smoothing,
    )
    evaluation = [evaluation_loader(rows, config.data.batch_size, **loading) for rows in validation.values()]
    size, seed = config.data.batch_size, config.seed
    if len(tasks) > 1:
        batches = multitask_loader(training, temperature, size, seed, **loading)
        shares = cast(TaskBatches, batches.sampler).shares
        shown = ", ".join(f"{task.name} {share:.1%}" for task, share in zip(tasks, shares, strict=True))
        log.info("%d batches an epoch, each of one task: %s", len(batches), shown)
    else:
        batches = training_loader(training[0], size, seed, **loading)
    interval = config.trainer.val_check_interval
    if (
        type(interval) is int
        and interval > len(batches)
        and config.trainer.check_val_every_n_epoch is not None
    ):
        raise UserError(
            f"trainer.val_check_interval={interval}: an epoch has {len(batches)} batches; expected no more than that, "
            "a fraction of it, or trainer.check_val_every_n_epoch=null"
        )
    if last is not None:
        position = last["position"]
        cast(EpochBatches, batches.sampler).resume(position["epoch"], position["batch"])
        over = position["epoch"] >= (config.trainer.max_epochs or 1)
        where = (
            "after the last epoch"
            if over
            else f"at epoch {position['epoch'] + 1}, batch {position['batch'] + 1}"
        )
        log.info("going on %s", where)
    module.count_time()
    broken = None
    with memory.explained(trainer, module):
        if model.trainable():
            try:
                with interrupts:
                    trainer.fit(
                        module,
                        batches,
                        evaluation,
                        ckpt_path=None if last is None else str(checkpoints / LAST),
                        weights_only=True,
                    )
            except LossNotFinite as error:
                broken = f"{error}: training stopped.\nLower optim.lr, or raise optim.warmup"
                if not module.history:
                    raise TrainingError(broken) from error
        if not module.history:  # nothing trains, or it stopped within the first epoch, by its steps or time
            trainer.validate(module, evaluation, verbose=False)
    seconds, joules = module.spent()
    diverged = divergence(module.epoch_loss.figures(), training, tasks)
    if config.trainer.profiler in PROFILERS and trainer.is_global_zero:
        for table in sorted(Path(config.trainer.default_root_dir or ".").glob("fit-profile*.txt"))[:1]:
            log.info("where the time went: %s", table)
    scores = best_epoch(module.history, monitor)
    if not model.trainable() and trainer.is_global_zero:
        shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "epoch")
        log.info("nothing trains  %s  %.1f s", shown, seconds)
    if trainer.is_global_zero:  # the others store nothing
        if best.weights is not None:
            copy_into(model.trainable(), best.weights, checkpoints)
        _check_finite(model)
    return Fit(
        metrics={
            split: {m: scores[f"{split}/{m}"] for m in task.metrics}
            for split, task in splits.items()
            if scores
        },
        best_epoch=int(scores.get("epoch", 0)) if model.trainable() else 0,
        # Not trainer.current_epoch, which is one less where a run that was taken up had nothing left to train.
        epochs=cast(Any, trainer.fit_loop.epoch_progress.current).processed,
        speed={
            "seconds": seconds,
            "seconds_per_step": clock.median(),
            "examples_per_second": module.rows_seen * trainer.world_size / seconds,
            "tokens_per_second": module.tokens_seen * trainer.world_size / seconds,
            "peak_memory_bytes": _peak_memory(),
            **({} if joules is None else {"energy_joules": joules}),
        },
        predicted=(module.predicted if best.weights is None else best.predicted) or {},
        decisions=module.decisions if best.weights is None else best.decisions,
        broken=broken,
        diverged=diverged,
    )


def _check_tokenizer(last: dict[str, Any], tokenizer: str | None) -> None:
    made_with = last.get(TOKENIZER)  # checkpoints of 0.1 do not have it
    if None not in (made_with, tokenizer) and made_with != tokenizer:
        raise UserError(
            f"the checkpoint was trained with another tokenizer (hash {str(made_with)[:8]}, now {str(tokenizer)[:8]})\n"
            "Restore the backbone's tokenizer files, or start over with resume=false"
        )


def make_trainer(
    config: TrainerConfig,
    callbacks: list[Callback],
    loggers: list[Logger],
    last: dict[str, Any] | None = None,
) -> lightning.Trainer:
    """Lightning's Trainer; batches are split over processes by our own samplers, checkpoints are our own.

    Args:
        last: the checkpoint that it will be asked to go on from.

    Raises:
        UserError: a value that Lightning refuses.
    """
    arguments: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    arguments["enable_checkpointing"] = False  # Lightning's own
    plugins: list[Any] = [] if last is None else [Loaded(last)]
    arguments["enable_progress_bar"] = any(isinstance(callback, ProgressBar) for callback in callbacks)
    if config.profiler in PROFILERS:  # by name, Lightning would give its table to a log that nobody reads
        folder = config.default_root_dir or "."
        arguments["profiler"] = PROFILERS[config.profiler](dirpath=folder, filename="profile")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its tips; ours says what happens
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
    # Lightning's own handlers requeue a SLURM job, as submitit does too, and broadcast SIGTERM, which never returns
    # where only one rank got it.
    cast(Any, trainer)._signal_connector.register_signal_handlers = lambda: None
    return trainer


def _check_finite(model: AdaptedModel) -> None:
    broken = [name for name, parameter in model.trainable().items() if not parameter.isfinite().all()]
    if broken:
        raise TrainingError(
            f"{broken[0]} and {len(broken) - 1} more hold values that are not finite; nothing is stored.\n"
            "Lower optim.lr, or raise optim.warmup"
        )


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

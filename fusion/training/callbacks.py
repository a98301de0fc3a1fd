"""Callbacks: seconds per step, the best epoch with early stopping, one line per epoch."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as lightning
import torch

from fusion.tasks.kind import Decision
from fusion.training import lightning_internals as internals
from fusion.training.module import TaskModule
from fusion.training.predictions import RowPredictions

log = logging.getLogger(__name__)


class StepTimer(lightning.Callback):
    """Measures each training batch: forward, backward and the optimizer, without the time between two batches."""

    def __init__(self) -> None:
        self._started = 0.0
        self._seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(self, *_: Any) -> None:
        if torch.cuda.is_available():  # kernels run on after their call returns
            torch.cuda.synchronize()
        self._seconds.append(time.monotonic() - self._started)

    def median(self) -> float | None:
        """Seconds; None: there was no step."""
        return statistics.median(self._seconds) if self._seconds else None


class Best(lightning.Callback):
    """Keeps the weights and predictions of the best epoch, and stops the training early.

    All decisions are functions of the scores so far, so a resumed run decides alike, unlike with Lightning's
    EarlyStopping and ModelCheckpoint. Only the first process keeps the weights, on the CPU.

    Args:
        monitor: the score that picks the best epoch, higher is better; of equal ones the first.
        patience: evaluated epochs without improvement before the training stops; None: it does not stop early.
    """

    def __init__(self, monitor: str, patience: int | None) -> None:
        self._monitor = monitor
        self._patience = patience
        self.weights: dict[str, torch.Tensor] | None = None
        self.predicted: dict[str, RowPredictions] = {}  # by split
        self.decisions: dict[str, Decision] = {}  # by task

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._stop_early(trainer, pl_module)  # the run was interrupted after its last epoch

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TaskModule)
        if (scores := pl_module.scores_of(trainer.current_epoch + 1)) is None:
            return
        if trainer.is_global_zero and best_epoch(pl_module.history, self._monitor) is scores:
            self.weights = {
                name: parameter.detach().to("cpu", copy=True) for name, parameter in pl_module.model.trainable().items()
            }
            self.predicted, self.decisions = pl_module.predicted, pl_module.decisions
        self._stop_early(trainer, pl_module)

    def _stop_early(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TaskModule)
        history, patience = pl_module.history, self._patience
        if patience is None or not history or epochs_since_best(history, self._monitor) < patience:
            return
        trainer.should_stop = True
        if trainer.is_global_zero and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            best = best_epoch(history, self._monitor)
            log.info(
                "stopped early: no better %s for optim.patience=%d evaluated epochs; best %.4f in epoch %d",
                self._monitor,
                patience,
                best[self._monitor],
                best["epoch"],
            )

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        predicted = {split: [p.rows, p.predictions, p.labels] for split, p in self.predicted.items()}
        checkpoint |= {"best": self.weights, "predicted": predicted, "decisions": self.decisions}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.weights, self.decisions = checkpoint["best"], checkpoint["decisions"]
        self.predicted = {split: RowPredictions(*parts) for split, parts in checkpoint["predicted"].items()}


def best_epoch(history: Sequence[dict[str, float]], monitor: str) -> dict[str, float]:
    """The first epoch with the highest score; empty if no epoch has one."""
    return max(history, key=lambda epoch: epoch[monitor], default={})


def epochs_since_best(history: Sequence[dict[str, float]], monitor: str) -> int:
    """Evaluated epochs after the best one."""
    return len(history) - 1 - list(history).index(best_epoch(history, monitor))


class EpochLine(lightning.Callback):
    """Logs one line per epoch: number, mean loss, scores and seconds.

    Args:
        monitor: as of `Best`.
    """

    def __init__(self, monitor: str) -> None:
        self._monitor = monitor
        self._started = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._started = time.monotonic()  # a run that resumes within an epoch has no on_train_epoch_start

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TaskModule)
        loss = pl_module.epoch_loss.mean(trainer.world_size)  # collective
        if not trainer.is_global_zero:
            return
        scores = pl_module.scores_of(trainer.current_epoch + 1) or {}
        shown = "".join(f"{name} {value:.4f}  " for name, value in scores.items() if name != "epoch")
        best = bool(scores) and best_epoch(pl_module.history, self._monitor) is scores
        done, batches = internals.batches_done(trainer), trainer.num_training_batches
        log.info(
            "epoch %d/%s%s  loss %.4f  %s%s%.1f s",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            f" ({done} of {batches} batches)" if done < batches else "",
            float("nan") if loss is None else loss,
            shown,
            "(best)  " if best else "",
            time.monotonic() - self._started,
        )

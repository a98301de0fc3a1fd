"""Callbacks: seconds per step, the best epoch with early stopping, one line per epoch."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any, cast

import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Timer

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

    All decisions are functions of the scores so far, so a resumed run decides alike. Lightning's EarlyStopping and
    ModelCheckpoint keep counters and files of their own. Only the first process keeps the weights, on the CPU.

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
                name: parameter.detach().to("cpu", copy=True)
                for name, parameter in pl_module.model.trainable().items()
            }
            self.predicted, self.decisions = pl_module.predicted, pl_module.decisions
        self._stop_early(trainer, pl_module)

    def _stop_early(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TaskModule)
        history = pl_module.history
        if self._patience is not None and history:
            trainer.should_stop = (
                trainer.should_stop or epochs_since_best(history, self._monitor) >= self._patience
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
    """The first epoch with the highest score; empty if there is none."""
    return max(history, key=lambda epoch: epoch[monitor], default={})


def epochs_since_best(history: Sequence[dict[str, float]], monitor: str) -> int:
    """Evaluated epochs after the best one."""
    return len(history) - 1 - list(history).index(best_epoch(history, monitor))


class EpochLine(lightning.Callback):
    """Logs one line per epoch: number, mean loss, scores, seconds; and at the end, why a training stopped early.

    Args:
        monitor, patience: as of `Best`.
    """

    def __init__(self, monitor: str, patience: int | None = None) -> None:
        self._monitor = monitor
        self._patience = patience
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
        first = pl_module.epoch_loss.first_batch
        done, batches = internals.batches_done(trainer), trainer.num_training_batches
        log.info(
            "epoch %d/%s%s  loss %.4f%s  %s%s%.1f s",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            f" ({done} of {batches} batches)" if done < batches else "",
            float("nan") if loss is None else loss,
            f" (from batch {first + 1} on)" if first else "",
            shown,
            "(best)  " if best else "",
            time.monotonic() - self._started,
        )

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TaskModule)
        if trainer.is_global_zero and (reason := self._reason(trainer, pl_module.history)) is not None:
            log.info("%s", reason)

    def _reason(self, trainer: lightning.Trainer, history: Sequence[dict[str, float]]) -> str | None:
        """Why a training ended before its last epoch did; None: it did not."""
        ended = internals.batches_done(trainer) >= trainer.num_training_batches
        if trainer.current_epoch >= (trainer.max_epochs or 0) and ended:
            return None
        if 0 < trainer.max_steps <= trainer.global_step:
            return f"stopped by trainer.max_steps={trainer.max_steps}"
        timers = [one for one in cast(Any, trainer).callbacks if isinstance(one, Timer)]
        if any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers):
            return "stopped by trainer.max_time"
        if self._patience is None or not history:
            return None
        since = epochs_since_best(history, self._monitor)
        if since < self._patience:
            return None
        best = best_epoch(history, self._monitor)
        unit = "epoch" if self._patience == 1 else "evaluated epochs"
        return (
            f"stopped early: {self._monitor} did not improve for {since} {unit} (optim.patience={self._patience}); "
            f"best {best[self._monitor]:.4f} in epoch {int(best['epoch'])}"
        )

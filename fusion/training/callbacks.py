"""The clock, the best epoch, and one line an epoch; why a training ended early."""

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
from fusion.training.module import TaskModule
from fusion.training.outcomes import Scored

log = logging.getLogger(__name__)


class StepClock(lightning.Callback):
    """How long a batch takes: forward, backward and the optimizer, without what lies between two batches."""

    def __init__(self) -> None:
        self._started = 0.0
        self._seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(self, *_: Any) -> None:
        if torch.cuda.is_available():  # what is asked of a GPU goes on after the call
            torch.cuda.synchronize()
        self._seconds.append(time.monotonic() - self._started)

    def median(self) -> float | None:
        """Seconds; None: there was no step."""
        return statistics.median(self._seconds) if self._seconds else None


class Best(lightning.Callback):
    """Keeps what the best epoch's weights were, and ends the training when no better one comes.

    What it decides is a function of the scores so far, so a run that is taken up again decides alike. Only the first
    process keeps the weights, on the CPU.

    Args:
        monitor: the score that counts, higher is better; of equal ones the first.
        patience: evaluated epochs without a better one; None: train to the end.
    """

    def __init__(self, monitor: str, patience: int | None) -> None:
        self._monitor = monitor
        self._patience = patience
        self.weights: dict[str, torch.Tensor] | None = None
        self.predicted: dict[str, Scored] | None = None  # by split, with those weights
        self.decisions: dict[str, Decision] = {}  # by task, likewise

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._stop_if_over(trainer, pl_module)  # interrupted after the last epoch

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TaskModule)
        history = pl_module.history
        if not history or history[-1]["epoch"] != trainer.current_epoch + 1:
            return  # an epoch without an evaluation
        if trainer.is_global_zero and best_epoch(history, self._monitor) is history[-1]:
            self.weights = {
                name: parameter.detach().to("cpu", copy=True)
                for name, parameter in pl_module.model.trainable().items()
            }
            self.predicted, self.decisions = pl_module.predicted, pl_module.decisions
        self._stop_if_over(trainer, pl_module)

    def _stop_if_over(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TaskModule)
        history = pl_module.history
        if self._patience is not None and history:
            since = len(history) - 1 - history.index(best_epoch(history, self._monitor))
            trainer.should_stop = trainer.should_stop or since >= self._patience

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["best"] = self.weights
        checkpoint["predicted"] = self.predicted and {
            split: [scored.rows, scored.predictions, scored.labels]
            for split, scored in self.predicted.items()
        }
        checkpoint["decisions"] = self.decisions

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.weights = checkpoint["best"]
        predicted = checkpoint.get("predicted") or {}
        if all(isinstance(parts, list) for parts in predicted.values()):  # otherwise of version 0.1
            # Tensors in those of earlier versions.
            self.predicted = {
                split: Scored(*(part.tolist() if torch.is_tensor(part) else part for part in parts))
                for split, parts in predicted.items()
            }
        self.decisions = checkpoint.get("decisions", {})


def best_epoch(history: Sequence[dict[str, float]], monitor: str) -> dict[str, float]:
    """The first epoch with the highest score; empty where nothing was evaluated."""
    return max(history, key=lambda epoch: epoch[monitor], default={})


class EpochLine(lightning.Callback):
    """After each epoch: where it is, the mean loss, the scores, how fast. At the end: why it ended early.

    Args:
        monitor: the score that counts.
        patience: of `Best`.
    """

    def __init__(self, monitor: str, patience: int | None = None) -> None:
        self._monitor = monitor
        self._patience = patience
        self._started = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._started = time.monotonic()  # a run that is taken up within an epoch does not start one

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TaskModule)
        loss = pl_module.epoch_loss.mean(trainer.world_size)  # all processes together
        if not trainer.is_global_zero:
            return
        seconds = time.monotonic() - self._started
        evaluated = pl_module.history and pl_module.history[-1]["epoch"] == trainer.current_epoch + 1
        scores = {k: v for k, v in pl_module.history[-1].items() if k != "epoch"} if evaluated else {}
        shown = "".join(f"{name} {value:.4f}  " for name, value in scores.items())
        before = [epoch[self._monitor] for epoch in pl_module.history[:-1]]
        best = bool(scores) and all(scores[self._monitor] > score for score in before)
        first = pl_module.epoch_loss.first_batch
        done, batches = _batches(trainer)
        log.info(
            "epoch %d/%s%s  loss %.4f%s  %s%s%.1f s",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            f" ({done} of {batches} batches)" if done < batches else "",
            float("nan") if loss is None else loss,
            f" (from batch {first + 1} on)" if first else "",
            shown,
            "(best)  " if best else "",
            seconds,
        )

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, TaskModule)
        if (why := self._why(trainer, pl_module.history)) is not None:
            log.info("%s", why)

    def _why(self, trainer: lightning.Trainer, history: Sequence[dict[str, float]]) -> str | None:
        """Why a training ended before its last epoch did; None: it did not."""
        done, batches = _batches(trainer)
        if trainer.current_epoch >= (trainer.max_epochs or 0) and done >= batches:
            return None
        if 0 < trainer.max_steps <= trainer.global_step:
            return f"stopped by trainer.max_steps={trainer.max_steps}"
        timers = [one for one in cast(Any, trainer).callbacks if isinstance(one, Timer)]
        if any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers):
            return "stopped by trainer.max_time"
        best = best_epoch(history, self._monitor)
        if self._patience is None or not best:
            return None
        since = len(history) - 1 - list(history).index(best)
        if since < self._patience:
            return None
        unit = "epoch" if self._patience == 1 else "evaluated epochs"
        return (
            f"stopped early: {self._monitor} did not improve for {since} {unit} (optim.patience={self._patience}); "
            f"best {best[self._monitor]:.4f} in epoch {int(best['epoch'])}"
        )


def _batches(trainer: lightning.Trainer) -> tuple[int, float]:
    """How many batches of the current epoch are done, and how many it has."""
    done = cast(Any, trainer.fit_loop.epoch_loop.batch_progress.current).processed
    return done, trainer.num_training_batches

"""The bar over a training: where it is, the score so far, tokens a second, how long still."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as lightning

from fusion.data.batches import Batch
from fusion.terminal.bars import TrainingBar, training_bar
from fusion.training.module import TaskModule


class ProgressBar(lightning.Callback):
    """Drawn by the first process alone, and only where its stderr is a terminal.

    What is done is counted in batches, those of the evaluations too, so that the time left takes both in. It is that
    of all epochs: early stopping may end sooner.

    Args:
        name: what is trained.
        monitor: the score that is shown.
    """

    def __init__(self, name: str, monitor: str) -> None:
        self._name, self._monitor = name, monitor
        self._bar: TrainingBar | None = None
        self._started = 0.0
        self._evaluated = 0  # batches of evaluations in this epoch
        self._trained = 0  # batches of this epoch
        self._epoch = 0  # batches of an epoch, those of its evaluations too

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        batches, epochs = int(trainer.num_training_batches), trainer.max_epochs or 1
        evaluations = int(batches // trainer.val_check_batch) if trainer.check_val_every_n_epoch else 0  # type: ignore[operator]
        every = trainer.check_val_every_n_epoch or 1
        self._epoch = batches + evaluations * sum(map(int, trainer.num_val_batches)) // every
        total = epochs * self._epoch
        if trainer.max_steps > 0:
            total = min(total, trainer.max_steps * trainer.accumulate_grad_batches * self._epoch // batches)
        self._bar = training_bar(self._name, total, epochs)
        self._show_score(pl_module)

    def on_train_epoch_start(self, *_: Any) -> None:
        self._trained = self._evaluated = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        if self._bar is None:
            return
        self._trained = batch_idx + 1
        self._bar.trains(
            self._completed(trainer),
            trainer.current_epoch + 1,
            batch.input_ids.numel() * trainer.world_size,
            time.monotonic() - self._started,
        )

    def on_validation_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if self._bar is not None and not trainer.sanity_checking:
            self._evaluated += 1
            self._bar.evaluates(self._completed(trainer))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._show_score(pl_module)

    def on_train_end(self, *_: Any) -> None:
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._close()

    def _completed(self, trainer: lightning.Trainer) -> int:
        return trainer.current_epoch * self._epoch + self._trained + self._evaluated

    def _show_score(self, module: lightning.LightningModule) -> None:
        assert isinstance(module, TaskModule)
        if self._bar is not None and module.history:
            scores = [epoch[self._monitor] for epoch in module.history]
            self._bar.scores(self._monitor.rpartition("/")[2], scores[-1], max(scores))

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None

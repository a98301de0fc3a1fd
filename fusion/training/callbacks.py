"""Callbacks: best-epoch selection with early stopping, epoch lines, progress bar, out-of-memory errors, speed."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import RichProgressBar

from fusion.config.data import DataConfig
from fusion.config.training import TrainerConfig
from fusion.data.batches import Batch
from fusion.errors import TrainingError, first_line
from fusion.tasks.kind import Decision
from fusion.training import lightning_internals as internals
from fusion.training.memory import Memory, peak_memory, reset_peak
from fusion.training.predictions import RowPredictions

log = logging.getLogger(__name__)

_TIMED = 10  # batches after which the time of a training is estimated
POWERCAP = Path("/sys/class/powercap")

# Messages of allocators that raise a plain RuntimeError: torch on a CPU (Linux, Windows), CUDA libraries, oneDNN.
_MESSAGE = re.compile(
    "can't allocate memory|not enough memory|CUDA error: out of memory|STATUS_ALLOC_FAILED|std::bad_alloc"
    "|could not create a (primitive|memory object)"
)


class Best(Callback):
    """Callback that keeps the weights and predictions of the best epoch and stops training early.

    Its decisions depend only on the metrics so far, so a resumed run makes the same decisions, unlike with Lightning's
    EarlyStopping and ModelCheckpoint. Only rank 0 keeps the weights, on the CPU. `monitor` is the metric that selects
    the best epoch: higher is better, and the earliest epoch wins ties. Evaluations before `min_epochs` epochs are not
    compared: with few validation examples, the highest of many noisy scores is a worse choice than the weights at the
    end of the schedule. With `patience=None`, it never stops early; otherwise after `patience` evaluations without a
    better one, not counting those in the first `min_epochs` epochs.
    """

    def __init__(self, monitor: str, patience: int | None) -> None:
        self.monitor = monitor
        self._patience = patience
        self.min_epochs = 0.0
        self.weights: dict[str, torch.Tensor] | None = None
        self.predicted: dict[str, RowPredictions] = {}  # by split
        self.decisions: dict[str, Decision] = {}  # by task

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._stop_early(trainer, pl_module)  # a run that was interrupted after its last epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if (scores := pl_module.scores_of(trainer.current_epoch + 1)) is None:
            return
        if trainer.is_global_zero and self.epoch(pl_module.history) is scores:
            trained = pl_module.model.trainable()
            self.weights = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}
            self.predicted, self.decisions = pl_module.predicted, pl_module.decisions
        self._stop_early(trainer, pl_module)

    def epoch(self, history: Sequence[dict[str, float]]) -> dict[str, float]:
        """Return the best epoch of `history`, or an empty dict if no epoch was evaluated."""
        return best_epoch(history, self.monitor, self.min_epochs)

    def _stop_early(self, trainer: Trainer, pl_module: Any) -> None:
        history, monitor, patience = pl_module.history, self.monitor, self._patience
        best = self.epoch(history)
        if patience is None or not history:
            return
        later = [one for one in history if one["epoch"] > max(best["epoch"], self.min_epochs)]
        if len(later) < patience:
            return
        trainer.should_stop = True
        if trainer.is_global_zero and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            text = "stopped early: %s did not improve for optim.patience=%d evaluated epochs; best %.4f in epoch %d"
            log.info(text, monitor, patience, best[monitor], best["epoch"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        predicted = {split: [p.rows, p.predictions, p.labels, p.confidence] for split, p in self.predicted.items()}
        checkpoint |= {"best": self.weights, "predicted": predicted, "decisions": self.decisions}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.weights, self.decisions = checkpoint["best"], checkpoint["decisions"]
        self.predicted = {split: RowPredictions(*parts) for split, parts in checkpoint["predicted"].items()}


def best_epoch(history: Sequence[dict[str, float]], monitor: str, min_epochs: float = 0.0) -> dict[str, float]:
    """Return the earliest epoch with the highest metric value, or an empty dict if no epoch was evaluated.

    Epochs before `min_epochs` count only if there are no later ones, as in a run that ended early.
    """
    late = [epoch for epoch in history if epoch["epoch"] >= min_epochs]
    return max(late or history, key=lambda epoch: epoch[monitor], default={})


class EpochLine(Callback):
    """Callback that logs number, mean loss, metrics and seconds of each epoch, and whether it is the best so far."""

    def __init__(self, best: Best) -> None:
        self._best = best

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._started = time.monotonic()

    on_train_start = on_train_epoch_start  # a run that resumes within an epoch has no on_train_epoch_start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        loss = pl_module.epoch_loss.mean()  # collective
        scores = pl_module.scores_of(trainer.current_epoch + 1) or {}
        every = trainer.check_val_every_n_epoch or 1
        if not trainer.is_global_zero or (every > 1 and not scores):  # short epochs without an evaluation
            return
        shown = "".join(f"{name} {value:.4f}  " for name, value in scores.items() if name != "epoch")
        best = bool(scores) and self._best.epoch(pl_module.history) is scores
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


class ProgressBar(RichProgressBar):
    """Progress bar that also shows the metric of the last and of the best epoch."""

    def __init__(self, best: Best) -> None:
        super().__init__(refresh_rate=10)
        self._best = best

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        history, monitor = pl_module.history, self._best.monitor
        if not history:
            return {}
        best = self._best.epoch(history)[monitor]
        return {monitor.rpartition("/")[2]: f"{history[-1][monitor]:.4f}", "best": f"{best:.4f}"}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error or one of its causes is an out-of-memory error."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if known or (isinstance(error, RuntimeError) and _MESSAGE.search(str(error))):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


class OutOfMemory(Callback):
    """Callback that tracks the current batch, so that out-of-memory errors report it and suggest settings."""

    def __init__(self, data: DataConfig, trainer: TrainerConfig, gradient_checkpointing: bool) -> None:
        self._data = data
        self._accumulate = trainer.accumulate_grad_batches
        self._gradient_checkpointing = gradient_checkpointing
        self._batch = "before the first batch"
        self._evaluating = False

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        self._batch, self._evaluating = f"at step {trainer.global_step}, {_size(rest[1])}", False

    def on_validation_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        self._batch = f"in the validation after {trainer.global_step} steps, {_size(rest[1])}"
        self._evaluating = True

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Convert an out-of-memory error raised in the context into a TrainingError with advice."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = f"out of memory {self._batch}; no artifact was saved ({first_line(error)})"
            raise TrainingError(f"{reason}\n{self._advice()}") from error

    def _advice(self) -> str:
        key = "batch_size" if self._data.tokens_per_batch is None else "tokens_per_batch"
        size = getattr(self._data, key)
        smaller = f"data.{key}={size // 2} trainer.accumulate_grad_batches={2 * self._accumulate}"
        if size < 2:
            smaller = f"a data.max_length below {self._data.max_length}"
        if self._evaluating or self._gradient_checkpointing:
            return f"Try {smaller}"
        return f"Try {smaller}, or backbone.gradient_checkpointing=true (slower, can resume this run, not with compile=true)"


def _size(batch: Batch) -> str:
    return f"in a batch of {batch.rows.numel()} examples x {batch.input_ids.shape[1]} tokens"


class EnergyMeter:
    """Energy consumed by the CPUs since construction, for all programs, read from Linux's powercap counters (RAPL).

    A counter may overflow at most once. On many machines the counters do not exist or only root can read them.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        # `intel-rapl:0` is a CPU package (also on AMD); `intel-rapl:0:1` is a subzone of it.
        self._zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._before = self._read("energy_uj")

    def joules(self) -> float | None:
        """Return the energy in joules, or `None` if a counter cannot be read."""
        now, maxima = self._read("energy_uj"), self._read("max_energy_range_uj")
        if not (self._before and now and maxima):
            return None
        return 1e-6 * sum(n - b + m * (n < b) for b, n, m in zip(self._before, now, maxima, strict=True))

    def _read(self, name: str) -> list[int]:
        try:
            return [int((zone / name).read_text(encoding="ascii")) for zone in self._zones]
        except (OSError, ValueError):
            return []


class Speed(Callback):
    """Callback that measures a training run from `start` on, in resumed runs plus the time before the checkpoint.

    The time per step includes forward, backward and optimizer step, but not data loading.
    """

    def __init__(self) -> None:
        self.expected: Memory | None = None
        self._steps: list[float] = []  # seconds
        self._examples = self._tokens = 0
        self._before: tuple[float, float | None] = (0.0, 0.0)  # seconds and joules up to the checkpoint

    def start(self, device: torch.device) -> None:
        self._device = device
        reset_peak(device)
        self._started, self._energy = time.monotonic(), EnergyMeter()

    def on_train_batch_start(self, *_: Any) -> None:
        self._step_started = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available():  # kernels run asynchronously
            torch.cuda.synchronize()
        self._steps.append(time.monotonic() - self._step_started)
        if len(self._steps) == _TIMED and trainer.is_global_zero:
            self._log_expected(trainer)
        self._examples += batch.rows.numel()
        self._tokens += batch.input_ids.numel()

    def _log_expected(self, trainer: Trainer) -> None:
        """Log the expected time of a longer training, without evaluations, from the first batches."""
        each, per_epoch = statistics.median(self._steps), float(trainer.num_training_batches)
        done = trainer.current_epoch * per_epoch + internals.batches_done(trainer)
        minutes = each * ((trainer.max_epochs or 0) * per_epoch - done) / 60
        if 1 <= minutes < math.inf:
            log.info("about %d min to the last epoch (%.2f s per batch), without evaluations", round(minutes), each)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"seen": [self._examples, self._tokens], "spent": list(self._elapsed())}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._examples, self._tokens = checkpoint["seen"]
        self._before = checkpoint["spent"]

    def _elapsed(self) -> tuple[float, float | None]:
        (seconds, joules), used = self._before, self._energy.joules()
        energy = None if joules is None or used is None else joules + used
        return seconds + time.monotonic() - self._started, energy

    def result(self, world_size: int) -> dict[str, float | None]:
        """Return seconds in total (with validation) and per step (median), examples and tokens (with padding) trained
        per second, peak and expected memory in bytes, and the energy in joules if the machine measures it.
        """
        seconds, joules = self._elapsed()
        return {
            "seconds": seconds,
            "seconds_per_step": statistics.median(self._steps) if self._steps else None,
            "examples_per_second": self._examples * world_size / seconds,
            "tokens_per_second": self._tokens * world_size / seconds,
            "peak_memory_bytes": peak_memory(self._device),
            "expected_memory_bytes": None if self.expected is None else self.expected.total,
            **({} if joules is None else {"energy_joules": joules}),
        }

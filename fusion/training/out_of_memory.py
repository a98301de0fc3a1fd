"""Out-of-memory errors of a training: name the step, the batch and the settings that take less memory."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as lightning
import torch

from fusion.config.data import DataConfig
from fusion.config.training import TrainerConfig
from fusion.data.batches import Batch
from fusion.errors import TrainingError, first_line

# Of allocators that raise a RuntimeError: torch's on a CPU (Linux, Windows), CUDA's libraries, oneDNN.
_MESSAGE = re.compile(
    "can't allocate memory|not enough memory|CUDA error: out of memory|STATUS_ALLOC_FAILED|std::bad_alloc"
    "|could not create a (primitive|memory object)"
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the error, or one that caused it, is an allocator's."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and _MESSAGE.search(str(error)):
            return True
        error = error.__cause__
    return False


class OutOfMemory(lightning.Callback):
    """Keeps track of the current batch, so that `explained` can name it."""

    def __init__(self, data: DataConfig, trainer: TrainerConfig, gradient_checkpointing: bool) -> None:
        self._data = data
        self._accumulate = trainer.accumulate_grad_batches
        self._gradient_checkpointing = gradient_checkpointing
        self._batch = "before the first batch"
        self._evaluating = False

    def on_train_batch_start(self, trainer: lightning.Trainer, *rest: Any) -> None:
        self._batch, self._evaluating = f"at step {trainer.global_step}, {_size(rest[1])}", False

    def on_validation_batch_start(self, trainer: lightning.Trainer, *rest: Any) -> None:
        self._batch = f"in the validation after {trainer.global_step} steps, {_size(rest[1])}"
        self._evaluating = True

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """
        Raises:
            TrainingError: the work inside ran out of memory; any other error passes.
        """
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = f"out of memory {self._batch}; nothing is stored ({first_line(error)})"
            raise TrainingError(f"{message}\n{self._advice()}") from error

    def _advice(self) -> str:
        key = "batch_size" if self._data.tokens_per_batch is None else "tokens_per_batch"
        size = getattr(self._data, key)
        smaller = f"data.{key}={size // 2} trainer.accumulate_grad_batches={2 * self._accumulate}"
        if size < 2:
            smaller = f"a data.max_length below {self._data.max_length}"
        if self._evaluating or self._gradient_checkpointing:
            return f"Try {smaller}"
        return (
            f"Try {smaller}, or backbone.gradient_checkpointing=true (slower; resumes this run; not with compile=true)"
        )


def _size(batch: Batch) -> str:
    return f"in a batch of {batch.rows.numel()} examples x {batch.input_ids.shape[1]} tokens"

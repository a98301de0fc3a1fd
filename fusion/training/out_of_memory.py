"""What a training says that runs out of memory: where it was, and what would have fitted.

What fits is tried and not computed: a forward and a backward pass over the longest rows that there are, with fewer and
fewer of them. All of it together takes a few steps' time. No process waits for another one in it.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import mmap
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as lightning
import torch

from fusion.config.stages import StageConfig
from fusion.data.batches import Batch
from fusion.data.encode import EncodedRows
from fusion.errors import TrainingError
from fusion.runs.memory import give_back_memory
from fusion.training.module import TaskModule

log = logging.getLogger(__name__)

# Bytes of addresses that a trial must leave: what compiles at run time takes them, from no allocator.
SPARE = 32 * 2**20
SECONDS = 120.0  # after which no further trial begins
# What allocators say in a RuntimeError: torch's on a CPU (Linux, Windows), CUDA's libraries, oneDNN.
_PHRASES = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)
# oneDNN says no more than this, which may have other causes: it counts where less of a batch gets through.
_VAGUE_PHRASES = ("could not create a primitive", "could not create a memory object")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator failed, here or in what caused this."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(seen, OSError) and seen.errno == errno.ENOMEM:
            return True
        if isinstance(seen, RuntimeError) and any(phrase in str(seen) for phrase in _PHRASES):
            return True
        seen = seen.__cause__
    return False


@dataclass(frozen=True)
class _Place:
    """A batch in work; step counts from 0."""

    evaluating: bool
    step: int
    rows: int
    tokens: int


@dataclass(frozen=True)
class _Part:
    """A batch that is `times` smaller than asked for, with the setting that makes such batches."""

    setting: str
    times: int
    rows: int


class OutOfMemory(lightning.Callback):
    """Turns an allocator's error into one that names the step, the batch and the settings that fit.

    Args:
        config: of the run.
        training, validation: the splits that batches come from.
    """

    def __init__(
        self, config: StageConfig, training: Sequence[EncodedRows], validation: Iterable[EncodedRows]
    ) -> None:
        self._config = config
        self._training, self._validation = list(training), list(validation)
        self._place: _Place | None = None

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._place = _Place(False, trainer.global_step, batch.rows.numel(), batch.input_ids.shape[1])

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._place = _Place(True, trainer.global_step, batch.rows.numel(), batch.input_ids.shape[1])

    @contextlib.contextmanager
    def explained(self, trainer: lightning.Trainer, module: TaskModule) -> Iterator[None]:
        """What is done within may run out of memory.

        Raises:
            TrainingError: it did. The model is of no use any more.
        """
        try:
            yield
        except Exception as error:
            certain = is_out_of_memory(error)
            if not (certain or _may_be(error)):
                raise
            _let_go(error)
            message = self._message(trainer, module, certain)
            if message is None:
                raise
            raise TrainingError(message) from error

    def _message(self, trainer: lightning.Trainer, module: TaskModule, certain: bool) -> str | None:
        """None: it was something else."""
        place = self._place
        if place is None:
            return (
                None
                if not certain
                else "out of memory before the first batch: the model alone takes more than there is"
            )
        where = f"in the evaluation after {place.step} steps" if place.evaluating else f"at step {place.step}"
        asked = f"{self._setting(1)} trainer.accumulate_grad_batches={self._accumulate}"
        said = (
            f"out of memory {where}, in a batch of {place.rows} rows of up to {place.tokens} tokens "
            f"({asked}); nothing is stored."
        )
        log.warning("out of memory: trying what would fit")
        try:
            advice = self._advice(trainer, module, place)
            if advice is None and not certain:
                return None
        except Exception as failed:  # the first error is what counts
            if not certain:
                return None
            log.warning("the trial went wrong: %s", failed)
            advice = (
                f"{self._lower} and raise trainer.accumulate_grad_batches as much, or say "
                "backbone.gradient_checkpointing=true"
            )
        longest = max(int(rows.lengths.max()) for rows in self._splits(place))
        nothing = (
            f"Not even one row of {longest} tokens fits: lower data.max_length={self._config.data.max_length}"
        )
        return f"{said}\n{advice or nothing}"

    def _splits(self, place: _Place) -> list[EncodedRows]:
        return self._validation if place.evaluating else self._training

    def _advice(self, trainer: lightning.Trainer, module: TaskModule, place: _Place) -> str | None:
        """What fits; None: nothing does."""
        deadline = time.monotonic() + SECONDS
        splits, model = self._splits(place), module.model

        def first_that_fits(parts: Sequence[_Part]) -> _Part | None:
            for part in parts:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it took more than {SECONDS:.0f} s")
                if self._fits(trainer, module, _longest(splits, part.rows), place.evaluating):
                    return part
            return None

        parts = self._parts(splits)
        found = first_that_fits(parts)
        ways = (
            [] if found is None else [f"{self._override(found)} fits, takes as much a step, and begins anew"]
        )
        if not (place.evaluating or model.gradient_checkpointing or self._config.compile):
            model.recompute_layers()
            whole = first_that_fits([self._part(splits, 1)])
            saving = "backbone.gradient_checkpointing=true"
            if whole is not None:
                ways.append(f"{saving} fits, takes longer, and goes on where this run was")
            elif found is None and (smaller := first_that_fits(parts)) is not None:
                ways.append(f"{saving} {self._override(smaller)} fits, takes as much a step, and begins anew")
        return "; or ".join(ways) or None

    # --- the settings -------------------------------------------------------------------------------

    @property
    def _accumulate(self) -> int:
        return self._config.trainer.accumulate_grad_batches

    @property
    def _lower(self) -> str:
        return (
            "Lower data.batch_size"
            if self._config.data.tokens_per_batch is None
            else "Lower data.tokens_per_batch"
        )

    def _setting(self, times: int) -> str:
        data = self._config.data
        if data.tokens_per_batch is None:
            return f"data.batch_size={data.batch_size // times}"
        return f"data.tokens_per_batch={data.tokens_per_batch // times}"

    def _override(self, part: _Part) -> str:
        return f"{part.setting} trainer.accumulate_grad_batches={self._accumulate * part.times}"

    def _parts(self, splits: Sequence[EncodedRows]) -> list[_Part]:
        """Smaller and smaller batches. Of rows: by what divides them, so that a step keeps its size."""
        data = self._config.data
        if data.tokens_per_batch is None:
            times = range(2, data.batch_size + 1)
            return [self._part(splits, k) for k in times if data.batch_size % k == 0]
        parts = [self._part(splits, 1)]
        while parts[-1].rows > 1:
            parts.append(self._part(splits, 2 * parts[-1].times))
        return parts[1:]

    def _part(self, splits: Sequence[EncodedRows], times: int) -> _Part:
        data = self._config.data
        if data.tokens_per_batch is None:
            return _Part(self._setting(times), times, data.batch_size // times)
        rows = max(_rows_within(split, data.tokens_per_batch // times) for split in splits)
        return _Part(self._setting(times), times, rows)

    # --- a trial ------------------------------------------------------------------------------------

    def _fits(self, trainer: lightning.Trainer, module: TaskModule, batch: Batch, evaluating: bool) -> bool:
        device = trainer.strategy.root_device
        try:
            module.to(device)  # Lightning has moved it away by now
            module.train(not evaluating)
            batch = batch.to(device)
            with trainer.precision_plugin.forward_context():
                if evaluating:
                    with torch.no_grad():
                        module.scores(batch)
                    return True
                parameters = list(module.model.trainable().values())
                # What the optimizer keeps, and the gradients of the batches before this one.
                copies = 1 if _keeps_state(trainer, device) else 3
                with mmap.mmap(-1, SPARE):
                    room = [torch.empty_like(p) for p in parameters for _ in range(copies)]
                    loss = torch.stack(list(module.losses(batch).values())).sum()
                    # Not `backward`: under DDP it would wait for the others.
                    torch.autograd.grad(loss, parameters, allow_unused=True)
                    del room
            return True
        except Exception as error:
            if not (is_out_of_memory(error) or _may_be(error)):
                raise
            _let_go(error)
            return False
        finally:
            module.cpu()
            _clear(module)


def _may_be(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _VAGUE_PHRASES)


def _longest(splits: Sequence[EncodedRows], rows: int) -> Batch:
    """The batch of so many rows that takes the most padded tokens."""
    batches = []
    for split in splits:
        chosen = _by_size(split)[:rows]
        batches.append((_padded(split, chosen), split, chosen))
    _, split, chosen = max(batches, key=lambda batch: batch[0])
    return split.batch(chosen.tolist())


def _by_size(split: EncodedRows) -> np.ndarray[Any, Any]:
    """Rows, the one of the most tokens first."""
    counts = 1 if split.choice_counts is None else split.choice_counts
    return np.argsort(-(split.lengths * counts), kind="stable")


def _padded(split: EncodedRows, rows: np.ndarray[Any, Any]) -> int:
    sequences = len(rows) if split.choice_counts is None else int(split.choice_counts[rows].sum())
    return sequences * int(split.lengths[rows].max())


def _rows_within(split: EncodedRows, tokens: int) -> int:
    """How many of the longest rows go into a budget; at least one, as in training."""
    order = _by_size(split)
    sequences = (
        np.arange(1, len(order) + 1) if split.choice_counts is None else split.choice_counts[order].cumsum()
    )
    padded = sequences * np.maximum.accumulate(split.lengths[order])
    return max(1, int((padded <= tokens).sum()))


def _keeps_state(trainer: lightning.Trainer, device: torch.device) -> bool:
    """Whether an optimizer's state lies on the device already."""
    states = (state for optimizer in trainer.optimizers for state in optimizer.state.values())
    values = (value for state in states for value in state.values() if torch.is_tensor(value))
    return any(value.ndim > 0 and value.device == device for value in values)


def _let_go(error: BaseException) -> None:
    """Drop what the failed calls held: the traceback would keep their tensors as long as the error is there."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__


def _clear(module: TaskModule) -> None:
    module.zero_grad(set_to_none=True)
    gc.collect()
    give_back_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

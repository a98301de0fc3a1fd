"""Loaders: a sampler's plans, gathered into batches."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fusion.data.batches import (
    Batch,
    EpochBatches,
    LengthBatches,
    Plan,
    SortedBatches,
    TaskBatches,
    TokenBatches,
)
from fusion.data.encode import EncodedRows


class PlannedBatches(Dataset[Batch]):
    """Encoded rows, of one task or of several, that are asked for by the batch."""

    def __init__(self, encoded: Sequence[EncodedRows]) -> None:
        self.encoded = encoded

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.encoded)

    def __getitem__(self, plan: Plan) -> Batch:
        return self.encoded[plan.task].batch(plan.rows, plan.weights, plan.global_rows, plan.global_indices)


def training_loader(
    encoded: EncodedRows,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    tokens_per_batch: int | None = None,
) -> DataLoader[Any]:
    """Batches of like length in a new order each epoch (`loader.sampler.set_epoch`).

    A device takes `batch_size` rows, or with `tokens_per_batch` as many as stay within that many padded tokens.
    Under DDP the Trainer needs `use_distributed_sampler=False`: the sampler knows its rank itself.
    """
    sampler = _training_sampler(encoded, batch_size, seed, rank, world_size, tokens_per_batch)
    return _loader([encoded], sampler, workers)


def multitask_loader(
    tasks: Sequence[EncodedRows],
    temperature: float,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    tokens_per_batch: int | None = None,
) -> DataLoader[Any]:
    """As `training_loader`, for several tasks: each batch is of one of them, see `TaskBatches`."""
    samplers = [
        _training_sampler(encoded, batch_size, seed, rank, world_size, tokens_per_batch) for encoded in tasks
    ]
    rows = [len(encoded) for encoded in tasks]
    return _loader(tasks, TaskBatches(samplers, rows, temperature, seed, rank, world_size), workers)


def _training_sampler(
    encoded: EncodedRows,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    tokens_per_batch: int | None,
) -> EpochBatches:
    if tokens_per_batch is None:
        return LengthBatches(encoded.lengths, batch_size, seed, rank, world_size)
    return TokenBatches(encoded.lengths, encoded.choice_counts, tokens_per_batch, seed, rank, world_size)


def evaluation_loader(
    encoded: EncodedRows,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    tokens_per_batch: int | None = None,
) -> DataLoader[Any]:
    """Each row once, longest first; rows of weight 0 only keep devices in step and count for nothing."""
    sampler = SortedBatches(
        encoded.lengths, batch_size, rank, world_size, tokens_per_batch, encoded.choice_counts
    )
    return _loader([encoded], sampler, workers)


def _loader(encoded: Sequence[EncodedRows], sampler: Sampler[Plan], workers: int) -> DataLoader[Any]:
    assert isinstance(sampler, Sized)
    return DataLoader(
        PlannedBatches(encoded),
        sampler=sampler,
        batch_size=None,  # a plan is a whole batch
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        # A loader draws a seed for its workers at each epoch. Of its own generator: drawn from the global one it
        # would change the dropout that follows, and a run resumed in mid-epoch would not equal one in one piece.
        generator=torch.Generator().manual_seed(0),
    )

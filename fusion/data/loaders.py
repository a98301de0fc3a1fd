"""Data loaders of encoded examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fusion.data.batches import Batch, EpochBatches, LengthBatches, Plan, SortedBatches, TaskBatches, TokenBatches
from fusion.data.encode import EncodedRows

_SAMPLE_SEED = 0  # independent of the run's seed, so that all runs use the same sample


class PlannedBatches(Dataset[Batch]):
    """Encoded examples of one or more tasks, indexed by the batch."""

    def __init__(self, encoded: Sequence[EncodedRows]) -> None:
        self.encoded = encoded

    def __getitem__(self, plan: Plan) -> Batch:
        return self.encoded[plan.task].batch(plan.rows, plan.weights, plan.global_indices)


def training_loader(
    tasks: Sequence[EncodedRows],
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    tokens_per_batch: int | None = None,
    temperature: float = 1.0,
) -> DataLoader[Any]:
    """Load batches of similar length, in a new order in each epoch (`loader.sampler.set_epoch`).

    A batch contains examples of one task, see `TaskBatches`. `tokens_per_batch`, a limit on the padded tokens per
    device, replaces `batch_size`. Under DDP the Trainer needs `use_distributed_sampler=False`.
    """
    samplers: list[EpochBatches] = [
        LengthBatches(rows.lengths, batch_size, seed, rank, world_size)
        if tokens_per_batch is None
        else TokenBatches(rows.lengths, rows.choice_counts, tokens_per_batch, seed, rank, world_size)
        for rows in tasks
    ]
    sampler = samplers[0]
    if len(tasks) > 1:
        sampler = TaskBatches(samplers, list(map(len, tasks)), temperature, seed, rank, world_size)
    return _loader(tasks, sampler, workers)


def largest_batch(loader: DataLoader[Any], batches: int | None = None) -> tuple[int, int]:
    """Return sequences and tokens of the largest of the first batches of an epoch of a training loader."""
    dataset, sampler = loader.dataset, loader.sampler
    assert isinstance(dataset, PlannedBatches) and isinstance(sampler, EpochBatches)
    shapes = (dataset.encoded[plan.task].shape(plan.rows) for plan in islice(sampler.plans(), batches))
    return max(shapes, key=lambda shape: shape[0] * shape[1])


def evaluation_loader(
    encoded: EncodedRows,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    tokens_per_batch: int | None = None,
) -> DataLoader[Any]:
    """Load each example once, longest first; examples of weight 0 only keep the devices in sync."""
    counts = encoded.choice_counts
    sampler = SortedBatches(encoded.lengths, batch_size, rank, world_size, tokens_per_batch, counts)
    return _loader([encoded], sampler, workers)


def sampled_batches(
    rows: EncodedRows, at_most: int | None, batch_size: int, tokens_per_batch: int | None = None
) -> Iterator[Batch]:
    """Yield batches of a fixed random sample of at most `at_most` examples (`None`: all), longest first."""
    chosen = np.arange(len(rows))
    if at_most is not None and at_most < len(rows):
        chosen = np.random.RandomState(_SAMPLE_SEED).permutation(len(rows))[:at_most]
    counts = None if rows.choice_counts is None else rows.choice_counts[chosen]
    for plan in SortedBatches(rows.lengths[chosen], batch_size, tokens=tokens_per_batch, counts=counts):
        yield rows.batch(chosen[plan.rows].tolist())


def _loader(encoded: Sequence[EncodedRows], sampler: EpochBatches | SortedBatches, workers: int) -> DataLoader[Any]:
    return DataLoader(
        PlannedBatches(encoded),
        sampler=sampler,
        batch_size=None,  # a plan is a complete batch
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        # A loader draws a seed for its workers in each epoch. With the global generator, this would change the dropout
        # masks, and a run resumed within an epoch would not be bit-equal.
        generator=torch.Generator().manual_seed(0),
    )

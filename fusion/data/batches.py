"""Which rows go together: batches of like length, the same for one process as for many.

Legend: n rows, `batch_size` rows per device, world_size devices; a *global batch* is the
batch_size * world_size rows that all devices take in one step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

# Global batches a sort covers: enough that a batch holds one length, few enough that rows meet new company each epoch.
_CHUNK = 50


@dataclass(frozen=True)
class Plan:
    """The rows of one batch on one device, before they are gathered.

    Attributes:
        rows: indices into the split.
        weights: 0.0 for a filler, which only keeps this device in step; 1.0 otherwise.
        global_rows: how many rows count in this step over all devices.
    """

    rows: list[int]
    weights: list[float]
    global_rows: int


@dataclass(frozen=True)
class Batch:
    """Encoded rows, padded to the longest of them.

    `sequences` is rows, or for choice tasks the sum of `choice_counts`: a row's choices stand one after another.

    Attributes:
        input_ids: (sequences, tokens) int64
        attention_mask: (sequences, tokens) int64, 0 for padding
        token_type_ids: (sequences, tokens) int64, None where the tokenizer gives none
        labels: (rows,) int64 class ids or indices of the right choice, or float32 values; None without labels
        choice_counts: (rows,) int64, choice tasks only
        rows: (rows,) int64, the index of each in its split
        weights: (rows,) float32, 0.0 for a filler row and 1.0 otherwise
        global_rows: rows that count in this batch over all devices
        prefix: (sequences, tokens, width) float32, zero at padding: what the frozen prefix of the model gives,
            where that is known
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    labels: Tensor | None
    choice_counts: Tensor | None
    rows: Tensor
    weights: Tensor
    global_rows: int
    prefix: Tensor | None = None

    def to(self, device: Any, **options: Any) -> Batch:
        """The batch on another device (Lightning moves whatever has a `to`)."""
        return self._mapped(lambda tensor: tensor.to(device, **options))

    def pin_memory(self) -> Batch:
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, change: Any) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: change(value) for name, value in values.items() if torch.is_tensor(value)}
        )


class LengthBatches(Sampler[Plan]):
    """Training batches of like length, in an order that is a pure function of (seed, epoch).

    Each epoch shuffles all rows, sorts chunks of 50 global batches by length, cuts them into global batches
    and shuffles these. Device r takes rows r, r + world_size, ... of each, so that two devices of 16 rows see
    together the very batches that one of 32 sees. The last rows of the last chunk may make a smaller batch.
    """

    def __init__(
        self, lengths: NDArray[np.integer], batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._resumed: tuple[int, int] | None = None
        _check(self.lengths, batch_size, rank, world_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def resume(self, epoch: int, batch: int) -> None:
        """Let the next pass over `epoch` begin at `batch`; later passes are whole."""
        self._resumed = (epoch, batch)

    def __len__(self) -> int:
        """Batches of a whole epoch, also where a resumed one gives fewer."""
        return -(-len(self.lengths) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Plan]:
        first = 0
        if self._resumed is not None:
            epoch, batch = self._resumed
            first = batch if epoch == self.epoch else 0
            self._resumed = None
        for rows in self._global_batches()[first:]:
            yield _share(rows, self.rank, self.world_size)

    def _global_batches(self) -> list[NDArray[np.intp]]:
        # RandomState and not Generator: its stream is frozen (NEP 19), so a resumed run may have another numpy.
        random = np.random.RandomState([self.seed, self.epoch])
        size = self.batch_size * self.world_size
        order = random.permutation(len(self.lengths))
        chunks = [order[start : start + _CHUNK * size] for start in range(0, len(order), _CHUNK * size)]
        ordered = np.concatenate([chunk[np.argsort(self.lengths[chunk], kind="stable")] for chunk in chunks])
        batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        return [batches[number] for number in random.permutation(len(batches))]


class SortedBatches(Sampler[Plan]):
    """Evaluation batches: each row once, longest first, so that too little memory shows at once."""

    def __init__(
        self, lengths: NDArray[np.integer], batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        _check(self.lengths, batch_size, rank, world_size)

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Plan]:
        size = self.batch_size * self.world_size
        order = np.argsort(-self.lengths, kind="stable")
        for start in range(0, len(order), size):
            yield _share(order[start : start + size], self.rank, self.world_size)


def _share(rows: NDArray[np.intp], rank: int, world_size: int) -> Plan:
    """Device `rank`'s rows of a global batch; a filler of weight 0 where it would have none."""
    own = rows[rank::world_size].tolist()
    if not own:
        return Plan([int(rows[0])], [0.0], len(rows))
    return Plan(own, [1.0] * len(own), len(rows))


def _check(lengths: NDArray[np.integer], batch_size: int, rank: int, world_size: int) -> None:
    if len(lengths) == 0:
        raise ValueError("no rows to make batches of")
    if batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"batch_size={batch_size}, rank={rank}, world_size={world_size}")

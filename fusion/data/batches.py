"""Which rows go together: batches of like length, the same for one process as for many.

Legend: n rows, `batch_size` rows (or `tokens` padded tokens) per device, world_size devices; a *global
batch* is what all devices take in one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import count, islice, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

# Global batches a sort covers: enough that a batch holds one length, few enough that rows meet new company each epoch.
_CHUNK = 50
# Neighbouring lengths that batches by tokens take for equal, so that rows meet new company: as many as fill two
# global batches, and no more than 8, for the shorter ones are padded.
_CLASS_BATCHES, _CLASS_LENGTHS = 2, 8


@dataclass(frozen=True)
class Plan:
    """The rows of one batch on one device, before they are gathered.

    Attributes:
        rows: indices into the split.
        weights: 0.0 for a filler, which only keeps this device in step; 1.0 otherwise.
        global_rows: how many rows count in this step over all devices.
        task: whose rows they are, where several tasks are trained at once.
        global_indices: the rows of all devices in this step; None: this device's alone.
    """

    rows: list[int]
    weights: list[float]
    global_rows: int
    task: int = 0
    global_indices: NDArray[np.intp] | None = None


@dataclass(frozen=True)
class Batch:
    """Encoded rows, padded to the longest of them.

    `sequences` is rows, or the sum of `choice_counts` where a row has several: its choices, or the windows of a sentence
    that is too long, one after another.

    Attributes:
        input_ids: (sequences, tokens) int64
        attention_mask: (sequences, tokens) int64, 0 for padding
        token_type_ids: (sequences, tokens) int64, None where the tokenizer gives none
        labels: (rows,) int64 or float32, or (rows, longest) int64 where a label is a list; None without labels
        choice_counts: (rows,) int64, the sequences of each row; None: one each
        rows: (rows,) int64, the index of each in its split
        weights: (rows,) float32, 0.0 for a filler row and 1.0 otherwise
        global_rows: rows that count in this batch over all devices
        features: (sequences, tokens, hidden size) float32, zero at padding: the model's cached frozen features, where
            there are any
        task: whose rows they are, where several tasks are trained at once
        global_weight: the sum of these rows' loss weights over all devices; None: all rows count alike
        words: (rows, most words) int64, rows of words only: where each word's first sub-word is among the sequences *
            tokens; -1 for padding
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    labels: Tensor | None
    choice_counts: Tensor | None
    rows: Tensor
    weights: Tensor
    global_rows: int
    features: Tensor | None = None
    task: int = 0
    global_weight: float | None = None
    words: Tensor | None = None

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


class EpochBatches(Sampler[Plan]):
    """Training batches in an order that is a pure function of (seed, epoch)."""

    def __init__(self, seed: int, rank: int, world_size: int) -> None:
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._resumed: tuple[int, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def resume(self, epoch: int, batch: int) -> None:
        """Let the next pass, which is over `epoch`, begin at `batch`; later passes are whole.

        A loader with workers begins its pass before anybody calls `set_epoch`.
        """
        self.set_epoch(epoch)
        self._resumed = (epoch, batch)

    def __len__(self) -> int:
        """Batches of a whole epoch, also where a resumed one gives fewer."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Plan]:
        first = 0
        if self._resumed is not None:
            epoch, batch = self._resumed
            first = batch if epoch == self.epoch else 0
            self._resumed = None
        # RandomState and not Generator: its stream is frozen (NEP 19), so a resumed run may have another numpy.
        random = np.random.RandomState([self.seed, self.epoch])
        for task, rows in islice(self._steps(random), first, None):
            yield replace(_share(rows, self.rank, self.world_size), task=task)

    def _steps(self, random: np.random.RandomState) -> Iterator[tuple[int, NDArray[np.intp]]]:
        """What each step of an epoch takes: a task, and the rows of its global batch."""
        return ((0, rows) for rows in self.shuffled(random))

    def shuffled(self, random: np.random.RandomState) -> list[NDArray[np.intp]]:
        """An epoch's global batches, in their order."""
        batches = self._global_batches(random)
        return [batches[number] for number in random.permutation(len(batches))]

    def _global_batches(self, random: np.random.RandomState) -> list[NDArray[np.intp]]:
        """The epoch's batches, before they are shuffled."""
        raise NotImplementedError


class LengthBatches(EpochBatches):
    """Training batches of `batch_size` rows a device and like length.

    Each epoch shuffles all rows, sorts chunks of 50 global batches by length, cuts them into global batches
    and shuffles these. Device r takes rows r, r + world_size, ... of each, so that two devices of 16 rows see
    together the very batches that one of 32 sees. The last rows of the last chunk may make a smaller batch.
    """

    def __init__(
        self, lengths: NDArray[np.integer], batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(seed, rank, world_size)
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        _check(self.lengths, batch_size, rank, world_size)

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.batch_size * self.world_size))

    def _global_batches(self, random: np.random.RandomState) -> list[NDArray[np.intp]]:
        size = self.batch_size * self.world_size
        order = random.permutation(len(self.lengths))
        chunks = [order[start : start + _CHUNK * size] for start in range(0, len(order), _CHUNK * size)]
        ordered = np.concatenate([chunk[np.argsort(self.lengths[chunk], kind="stable")] for chunk in chunks])
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]


class TokenBatches(EpochBatches):
    """Training batches of at most `tokens` padded tokens (sequences times width) a device.

    Rows of neighbouring lengths, and of one number of sequences, are a class. Sorted by class, the rows stand in
    the same classes in every epoch, so they are cut once: each epoch has as many batches as any other. It
    shuffles the rows within their classes, and the batches. Device r takes rows r, r + world_size, ... of a
    global batch. A row beyond the budget is alone on its device.

    A batch of short rows has more of them, and the loss is a mean over the batch: a short row weighs less.

    Args:
        lengths: (n,) tokens of each row's longest sequence.
        counts: (n,) sequences of each row (choice tasks); None: one each.
        tokens: the budget of a device.
    """

    def __init__(
        self,
        lengths: NDArray[np.integer],
        counts: NDArray[np.integer] | None,
        tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(seed, rank, world_size)
        lengths = np.asarray(lengths)
        _check(lengths, tokens, rank, world_size)
        counts = np.ones_like(lengths) if counts is None else np.asarray(counts)
        widths = _class_widths(lengths, counts, tokens * world_size)
        self._class = widths * (counts.max() + 1) + counts
        order = np.argsort(-self._class, kind="stable")
        self._cuts = _cut_by_tokens(widths[order], counts[order], tokens, world_size)

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def _global_batches(self, random: np.random.RandomState) -> list[NDArray[np.intp]]:
        order = random.permutation(len(self._class))
        ordered = order[np.argsort(-self._class[order], kind="stable")]
        return [ordered[start:end] for start, end in pairwise(self._cuts)]


class TaskBatches(EpochBatches):
    """Training batches of several tasks, one task a batch, drawn with p_i proportional to n_i^(1/T).

    n_i are the task's rows (Stickland & Murray 2019, whose alpha is 1/T): T = 1 draws in proportion to the rows, a
    higher T brings small tasks up. An epoch has as many batches as the tasks' own epochs together. A task's
    batches are those of its own sampler, which begins anew in each epoch, newly shuffled, and once more wherever its
    rows are used up within it. All devices draw the same task at the same step.

    Args:
        samplers: one a task, of this rank and world size.
        rows: (tasks,) n_i.
        temperature: T.
    """

    def __init__(
        self,
        samplers: Sequence[EpochBatches],
        rows: Sequence[int],
        temperature: float,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(seed, rank, world_size)
        self.samplers = list(samplers)
        # Through logarithms, which no small temperature makes overflow.
        shares = np.log(rows) / temperature
        shares = np.exp(shares - shares.max())
        self.shares: NDArray[np.float64] = shares / shares.sum()

    def __len__(self) -> int:
        return sum(len(sampler) for sampler in self.samplers)

    def _steps(self, random: np.random.RandomState) -> Iterator[tuple[int, NDArray[np.intp]]]:
        streams = [self._stream(task) for task in range(len(self.samplers))]
        for task in random.choice(len(streams), len(self), p=self.shares).tolist():
            yield task, next(streams[task])

    def _stream(self, task: int) -> Iterator[NDArray[np.intp]]:
        """A task's global batches in this epoch, pass after pass over its rows, without end."""
        for number in count():
            random = np.random.RandomState([self.seed, self.epoch, task, number])
            yield from self.samplers[task].shuffled(random)


class SortedBatches(Sampler[Plan]):
    """Evaluation batches: each row once, longest first, so that too little memory shows at once.

    Args:
        lengths: (n,) tokens of each row's longest sequence.
        batch_size: rows a device, unless there is a budget.
        tokens: padded tokens a device; a row beyond that is alone on its device.
        counts: (n,) sequences of each row (choice tasks); None: one each.
    """

    def __init__(
        self,
        lengths: NDArray[np.integer],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        tokens: int | None = None,
        counts: NDArray[np.integer] | None = None,
    ) -> None:
        lengths = np.asarray(lengths)
        self.rank = rank
        self.world_size = world_size
        _check(lengths, batch_size if tokens is None else tokens, rank, world_size)
        self._order = np.argsort(-lengths, kind="stable")
        if tokens is None:
            self._cuts = [*range(0, len(lengths), batch_size * world_size), len(lengths)]
        else:
            counts = np.ones_like(lengths) if counts is None else np.asarray(counts)
            self._cuts = _cut_by_tokens(lengths[self._order], counts[self._order], tokens, world_size)

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def __iter__(self) -> Iterator[Plan]:
        for start, end in pairwise(self._cuts):
            yield _share(self._order[start:end], self.rank, self.world_size)


def _class_widths(
    lengths: NDArray[np.integer], counts: NDArray[np.integer], tokens: int
) -> NDArray[np.integer]:
    """(n,) -> (n,) the longest length in the class of each row's.

    Args:
        tokens: of a global batch.
    """
    width_of = np.zeros(lengths.max() + 1, lengths.dtype)
    width, filled = 0, 0
    sequences = np.bincount(lengths, weights=counts)
    for length in np.flatnonzero(sequences)[::-1]:
        if width - length >= _CLASS_LENGTHS or filled >= _CLASS_BATCHES * tokens or width == 0:
            width, filled = length, 0
        width_of[length] = width
        filled += sequences[length] * width
    return width_of[lengths]


def _cut_by_tokens(
    widths: NDArray[np.integer], counts: NDArray[np.integer], tokens: int, world_size: int
) -> list[int]:
    """Where global batches begin, and the end: each as many rows as keep all devices within the budget.

    Args:
        widths: (n,) falling, so that a batch is as wide as its first row.
        counts: (n,) sequences of each row, at least 1.
    """
    cuts = [0]
    while cuts[-1] < len(widths):
        start = cuts[-1]
        room = max(1, tokens // int(widths[start]))  # sequences a device
        taken = counts[start : start + room * world_size]
        padded = np.zeros(-(-len(taken) // world_size) * world_size, np.int64)
        padded[: len(taken)] = taken
        beyond = np.cumsum(padded.reshape(-1, world_size), axis=0) > room
        beyond[0] = False  # its first row a device takes in any case
        first_beyond = np.flatnonzero(beyond.ravel()[: len(taken)])
        cuts.append(start + (int(first_beyond[0]) if len(first_beyond) else len(taken)))
    return cuts


def _share(rows: NDArray[np.intp], rank: int, world_size: int) -> Plan:
    """Device `rank`'s rows of a global batch; a filler of weight 0 where it would have none."""
    own = rows[rank::world_size].tolist()
    if not own:
        return Plan([int(rows[0])], [0.0], len(rows), global_indices=rows)
    return Plan(own, [1.0] * len(own), len(rows), global_indices=rows)


def _check(lengths: NDArray[np.integer], size: int, rank: int, world_size: int) -> None:
    if len(lengths) == 0:
        raise ValueError("no rows to make batches of")
    if size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"size={size}, rank={rank}, world_size={world_size}")

"""Samplers of batches by length; the batches do not depend on the number of processes.

Legend: n examples, `batch_size` examples (or `tokens` padded tokens) per device, world_size devices; a *global batch*
contains the batches of all devices in one step. `lengths` (n,): number of tokens of each example's longest sequence;
`counts` (n,): number of sequences of each example (if `None`, one each).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

# Global batches sorted by length together: enough for little padding, few enough to shuffle examples in each epoch.
_CHUNK = 50
# A length bucket of `TokenBatches` has as many neighboring lengths as fill two global batches, to shuffle examples, and
# at most 8, to limit padding.
_BUCKET_BATCHES, _BUCKET_LENGTHS = 2, 8

Ints = NDArray[np.integer]


@dataclass(frozen=True)
class Plan:
    """The examples of one batch on one device."""

    rows: list[int]  # indices into the split
    weights: list[float]  # 0.0 for a filler example, which only keeps the devices in sync; 1.0 otherwise
    global_indices: NDArray[np.intp]  # of the examples on all devices in this step, without fillers
    task: int = 0  # index in multi-task training


@dataclass(frozen=True)
class Batch:
    """Encoded examples, padded to the longest sequence.

    B is the number of examples. `sequences` equals B, or the sum of `choice_counts` if examples have multiple
    sequences: their choices, or the windows of long sentences, in order.
    """

    input_ids: Tensor  # (sequences, tokens) int64
    attention_mask: Tensor  # (sequences, tokens) int64, 0 for padding
    token_type_ids: Tensor | None  # (sequences, tokens) int64; `None` if the tokenizer has none
    labels: Tensor | None  # (B,) int64 or float32, (B, longest) int64 for labels that are lists; `None` without labels
    choice_counts: Tensor | None  # (B,) int64, number of sequences of each example; `None` if one each
    rows: Tensor  # (B,) int64, indices of the examples in the split
    weights: Tensor  # (B,) float32, 0.0 for a filler example and 1.0 otherwise
    global_rows: int  # number of examples in this step on all devices, without fillers
    features: Tensor | None = None  # (sequences, tokens, hidden size) float32, cached frozen features, 0 for padding
    task: int = 0  # index in multi-task training
    global_weight: float | None = None  # sum of the examples' loss weights on all devices; `None` if all are equal
    # (B, most words) int64: index of each word's first sub-word in the flattened `input_ids`, -1 for padding
    words: Tensor | None = None

    def to(self, device: Any, **options: Any) -> Batch:
        """Move the batch to a device; Lightning calls it."""
        return self._mapped(lambda tensor: tensor.to(device, **options))

    def pin_memory(self) -> Batch:
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Any) -> Batch:
        return replace(self, **{name: change(value) for name, value in vars(self).items() if torch.is_tensor(value)})


class EpochBatches(Sampler[Plan]):
    """Training batches, in an order that depends only on the seed and the epoch.

    `cuts`: index of the first example of each global batch among the examples of an epoch, and the end.
    """

    def __init__(self, cuts: Sequence[int], seed: int, rank: int, world_size: int) -> None:
        self._cuts = cuts
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._resumed: tuple[int, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def resume(self, epoch: int, batch: int) -> None:
        """Start the next pass, over `epoch`, at `batch`. A loader with workers starts it before `set_epoch` is called."""
        self.set_epoch(epoch)
        self._resumed = (epoch, batch)

    def __len__(self) -> int:
        """Return the number of batches of a complete epoch, even if a resumed epoch yields fewer."""
        return len(self._cuts) - 1

    def __iter__(self) -> Iterator[Plan]:
        epoch, batch = self._resumed or (self.epoch, 0)
        self._resumed = None
        return self.plans(batch if epoch == self.epoch else 0)

    def plans(self, start: int = 0) -> Iterator[Plan]:
        """Yield the batches of the epoch from the batch `start` on."""
        # RandomState's stream is frozen (NEP 19), unlike Generator's, so other NumPy versions can resume a run.
        random = np.random.RandomState([self.seed, self.epoch])
        for task, rows in islice(self._steps(random), start, None):
            yield replace(_share(rows, self.rank, self.world_size), task=task)

    def _steps(self, random: np.random.RandomState) -> Iterator[tuple[int, NDArray[np.intp]]]:
        """Yield, for each step of an epoch, the task and the examples of the global batch."""
        return ((0, rows) for rows in self.shuffled(random))

    def shuffled(self, random: np.random.RandomState) -> list[NDArray[np.intp]]:
        """Return an epoch's global batches, shuffled."""
        ordered = self._ordered(random)
        batches = [ordered[start:end] for start, end in pairwise(self._cuts)]
        return [batches[number] for number in random.permutation(len(batches))]

    def _ordered(self, random: np.random.RandomState) -> NDArray[np.intp]:
        """Return an epoch's examples, to be cut into global batches."""
        raise NotImplementedError


class LengthBatches(EpochBatches):
    """Training batches of `batch_size` examples of similar length per device.

    Each epoch shuffles all examples, sorts chunks of 50 global batches by length, splits them into global batches and
    shuffles these. Device r gets examples r, r + world_size, ..., so two devices with batch size 16 use the same
    global batches as one with batch size 32. The last batch may be smaller.
    """

    def __init__(self, lengths: Ints, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        size = batch_size * world_size
        super().__init__([*range(0, len(lengths), size), len(lengths)], seed, rank, world_size)
        self.lengths = lengths
        self._chunk = _CHUNK * size

    def _ordered(self, random: np.random.RandomState) -> NDArray[np.intp]:
        order = random.permutation(len(self.lengths))
        chunks = [order[start : start + self._chunk] for start in range(0, len(order), self._chunk)]
        return np.concatenate([chunk[np.argsort(self.lengths[chunk], kind="stable")] for chunk in chunks])


class TokenBatches(EpochBatches):
    """Training batches of at most `tokens` padded tokens (sequences times width) per device.

    Examples of neighboring lengths with the same number of sequences form a bucket. The sizes of the batches are
    computed once, so every epoch has the same number of batches; an epoch shuffles the examples within their buckets,
    then the batches. Device r gets examples r, r + world_size, ... of a global batch. An example beyond the budget is a
    batch by itself. The loss is the mean over a batch, so examples in large batches of short texts have less weight.
    """

    def __init__(
        self, lengths: Ints, counts: Ints | None, tokens: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        counts = np.ones_like(lengths) if counts is None else counts
        widths = _bucket_widths(lengths, counts, tokens * world_size)
        self._bucket = widths * (counts.max() + 1) + counts
        order = np.argsort(-self._bucket, kind="stable")
        super().__init__(_cut_by_tokens(widths[order], counts[order], tokens, world_size), seed, rank, world_size)

    def _ordered(self, random: np.random.RandomState) -> NDArray[np.intp]:
        order = random.permutation(len(self._bucket))
        return order[np.argsort(-self._bucket[order], kind="stable")]


class TaskBatches(EpochBatches):
    """Multi-task training batches, one task per batch, sampled with p_i proportional to n_i^(1/T).

    n_i is the task's number of examples (Stickland & Murray 2019, whose alpha is 1/T); a higher T samples small tasks
    more often. An epoch has as many batches as the tasks' own epochs together. A task's batches come from its own
    sampler, reshuffled in each epoch and whenever its examples are exhausted. All devices sample the same task in the
    same step.

    `samplers`: one sampler per task, for this rank and world size; `rows`: (tasks,) n_i.
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
        super().__init__(range(1 + sum(map(len, samplers))), seed, rank, world_size)
        self.samplers = list(samplers)
        shares = np.log(rows) / temperature  # logarithms do not overflow at small temperatures
        shares = np.exp(shares - shares.max())
        self.shares: NDArray[np.float64] = shares / shares.sum()

    def _steps(self, random: np.random.RandomState) -> Iterator[tuple[int, NDArray[np.intp]]]:
        streams = [self._stream(task) for task in range(len(self.samplers))]
        for task in random.choice(len(streams), len(self), p=self.shares).tolist():
            yield task, next(streams[task])

    def _stream(self, task: int) -> Iterator[NDArray[np.intp]]:
        """Yield a task's global batches in this epoch, in endless passes over its examples."""
        for number in count():
            random = np.random.RandomState([self.seed, self.epoch, task, number])
            yield from self.samplers[task].shuffled(random)


class SortedBatches(Sampler[Plan]):
    """Evaluation batches: each example once, longest first, so that out-of-memory errors occur immediately.

    `tokens`, the padded tokens per device, replaces `batch_size`; an example beyond it is a batch by itself.
    """

    def __init__(
        self,
        lengths: Ints,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        tokens: int | None = None,
        counts: Ints | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._order = np.argsort(-lengths, kind="stable")
        if tokens is None:
            self._cuts = [*range(0, len(lengths), batch_size * world_size), len(lengths)]
        else:
            counts = np.ones_like(lengths) if counts is None else counts
            self._cuts = _cut_by_tokens(lengths[self._order], counts[self._order], tokens, world_size)

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def __iter__(self) -> Iterator[Plan]:
        for start, end in pairwise(self._cuts):
            yield _share(self._order[start:end], self.rank, self.world_size)


def _bucket_widths(lengths: Ints, counts: Ints, tokens: int) -> Ints:
    """Return the padded length (n,) of each example's bucket; `tokens` is the token budget of a global batch."""
    width_of = np.zeros(lengths.max() + 1, lengths.dtype)
    width, filled = 0, 0
    sequences = np.bincount(lengths, weights=counts)
    for length in np.flatnonzero(sequences)[::-1]:
        if width - length >= _BUCKET_LENGTHS or filled >= _BUCKET_BATCHES * tokens or width == 0:
            width, filled = length, 0
        width_of[length] = width
        filled += sequences[length] * width
    return width_of[lengths]


def _cut_by_tokens(widths: Ints, counts: Ints, tokens: int, world_size: int) -> list[int]:
    """Return the first example of each global batch, and the end; each device stays within its token budget.

    widths: (n,) descending, so that a batch is as wide as its first example.
    """
    cuts = [0]
    while cuts[-1] < len(widths):
        start = cuts[-1]
        limit = max(1, tokens // int(widths[start]))  # sequences per device
        taken = counts[start : start + limit * world_size]
        padded = np.zeros(-(-len(taken) // world_size) * world_size, np.int64)
        padded[: len(taken)] = taken
        beyond = np.cumsum(padded.reshape(-1, world_size), axis=0) > limit
        beyond[0] = False  # each device gets at least one example
        first_beyond = np.flatnonzero(beyond.ravel()[: len(taken)])
        cuts.append(start + (int(first_beyond[0]) if len(first_beyond) else len(taken)))
    return cuts


def _share(rows: NDArray[np.intp], rank: int, world_size: int) -> Plan:
    """Return the examples of a global batch on device `rank`, or a filler of weight 0 if there are none."""
    own = rows[rank::world_size].tolist()
    return Plan(own or [int(rows[0])], [1.0] * len(own) or [0.0], rows)

"""When a training whose loss stayed finite counts as diverged.

The mean training loss of its last epoch (the task's own, without penalties) is then more than `FACTOR` times the larger
of two: the loss of a model whose scores are all zero, which knows nothing, and the loss of the first batch, before any
update. Zero scores cost log(labels) in cross entropy, and the mean square of the labels in a regression.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion.config import TaskConfig
from fusion.data.encode import EncodedRows

FACTOR = 3.0


class EpochLoss:
    """The loss of the first batch of a training, and the mean over the batches of its latest epoch."""

    def __init__(self) -> None:
        self._first: Tensor | float | None = None
        self._epoch = -1
        self._sum: Tensor | float = 0.0
        self._batches = 0

    def add(self, loss: Tensor, epoch: int) -> None:
        """loss: a scalar, of one batch. It is not waited for."""
        if self._first is None:
            self._first = loss
        if epoch != self._epoch:
            self._epoch, self._sum, self._batches = epoch, 0.0, 0
        self._sum = self._sum + loss
        self._batches += 1

    def state(self) -> list[Any]:
        """What a checkpoint holds, so that a resumed training has the same figures."""
        first = None if self._first is None else float(self._first)
        return [first, self._epoch, float(self._sum), self._batches]

    def load(self, state: Sequence[Any]) -> None:
        self._first, self._epoch, self._sum, self._batches = state

    def figures(self) -> tuple[float, float] | None:
        """Loss of the first batch and mean of the last epoch, over all processes; None where nothing was trained.

        Under DDP, every process has to call it.
        """
        first, _, total, batches = self.state()
        everywhere: list[Any] = [(first, total / batches) if batches else None]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            own = everywhere[0]
            everywhere = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everywhere, own)
        found = [figures for figures in everywhere if figures is not None]
        if not found:
            return None
        firsts, lasts = zip(*found, strict=True)
        return sum(firsts) / len(firsts), sum(lasts) / len(lasts)


def zero_score_loss(rows: EncodedRows, task: TaskConfig) -> float:
    """The mean loss of scores that are all zero. Neither class weights nor label smoothing change it."""
    assert rows.labels is not None
    if task.kind == "regression":
        return float(np.mean(rows.labels.astype(np.float64) ** 2))
    if rows.choice_counts is not None:
        return float(np.mean(np.log(rows.choice_counts)))
    return math.log(len(task.labels or [None]))


def divergence(
    figures: tuple[float, float] | None, training: Sequence[EncodedRows], tasks: Sequence[TaskConfig]
) -> dict[str, float] | None:
    """`{"train_loss", "limit"}` of a training that diverged, as result.json has it; None of any other.

    Args:
        figures: of `EpochLoss`.
        training: a split of each task.
    """
    if figures is None:
        return None
    first, last = figures
    limit = FACTOR * max(first, *(zero_score_loss(rows, tasks[rows.task]) for rows in training))
    return {"train_loss": last, "limit": limit} if last > limit else None


def shown(diverged: Mapping[str, Any]) -> str:
    return f"training loss {diverged['train_loss']:.4g} in the last epoch, above {diverged['limit']:.4g}"

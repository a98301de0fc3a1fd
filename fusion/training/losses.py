"""The training loss: values that are not finite, the mean over an epoch, and divergence with a finite loss.

Nothing here synchronizes the device at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusion.config.task import TaskConfig
from fusion.data.encode import EncodedRows
from fusion.errors import LossNotFinite
from fusion.tasks.table import kind_of
from fusion.training.processes import gathered

_SHOWN = 8  # rows in a message
_DIVERGED = 3.0  # the factor of `divergence`


class Losses:
    """The losses since the last check: of each training batch a scalar, its step, rows and split."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, int, Tensor, str]] = []

    def add(self, loss: Tensor, step: int, rows: Tensor, split: str) -> None:
        self._seen.append((loss, step, rows, split))

    def broken(self) -> bool:
        """Whether one of this process is not finite."""
        return bool(self._seen) and not bool(torch.stack([loss for loss, *_ in self._seen]).isfinite().all())

    def check(self, distributed: bool) -> None:
        """Check all losses since the last call. Under DDP, all processes have to call it.

        Raises:
            LossNotFinite: names the first such step and its rows.
        """
        seen, self._seen = self._seen, []
        values = torch.stack([loss for loss, *_ in seen]) if seen else torch.zeros(0)
        bad = [seen[n] for n in (~values.isfinite()).nonzero().flatten().tolist()]
        if distributed:
            there = torch.tensor(float(bool(bad)), device=values.device)
            torch.distributed.all_reduce(there)
            if not there.item():
                return
        own = [(step, loss.item(), rows.tolist(), split) for loss, step, rows, split in bad]
        found = [entry for of_process in gathered(own) for entry in of_process]
        if found:
            step, loss, rows, split = min(found, key=lambda entry: entry[0])
            shown = ", ".join(map(str, rows[:_SHOWN])) + (" …" if len(rows) > _SHOWN else "")
            raise LossNotFinite(f"the loss is {loss} at step {step} (rows {shown} of {split}, counted from 0)")


class EpochLoss:
    """The mean training loss of an epoch, of the whole loss and of the task's own: sums in double precision.

    A checkpoint stores them, unless there is more than one process, since only the first one writes: the mean of the epoch
    in which such a run resumes is over the batches since then.
    """

    def __init__(self) -> None:
        self._first: Tensor | float | None = None  # the task's loss of the training's first batch
        self.restart()

    def restart(self) -> None:
        """Start a new epoch."""
        self._sums: Tensor | None = None
        self._weight = 0.0

    def add(self, total: Tensor, task: Tensor, weight: float) -> None:
        """
        Args:
            total, task: scalar losses of a batch: this process's part of the mean over all processes.
            weight: the examples of the batch in all processes; with class weights, the sum of their weights.
        """
        parts = torch.stack([total, task]).detach().to(_wide(total.device))
        if self._first is None:
            self._first = parts[1]
        self._sums = parts * weight if self._sums is None else self._sums + parts * weight
        self._weight += weight

    def mean(self, processes: int = 1) -> float | None:
        """The mean of the whole loss so far, equal in all processes; None: no batch. All processes have to call it."""
        if self._sums is None:
            return None
        total = self._sums[0].clone()
        if processes > 1:
            torch.distributed.all_reduce(total)
        return float(total) / processes / self._weight

    def figures(self) -> tuple[float, float] | None:
        """The task's loss of the training's first batch, and its mean over the last epoch; None: no batch.

        All processes have to call it.
        """
        own = None
        if self._sums is not None and self._first is not None:
            own = float(self._first), float(self._sums[1]) / self._weight
        found = [figures for figures in gathered(own) if figures is not None]
        if not found:
            return None
        firsts, lasts = zip(*found, strict=True)
        return sum(firsts) / len(firsts), sum(lasts) / len(lasts)

    def state(self, processes: int) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "first": None if self._first is None else float(self._first),
            "sums": None if self._sums is None or processes > 1 else self._sums.tolist(),
            "weight": self._weight,
        }

    def resume(self, state: dict[str, Any], processes: int, device: torch.device) -> None:
        """Continue from `state()`."""
        self._first = state["first"]
        if state["sums"] is not None and processes == 1:
            self._sums = torch.tensor(state["sums"], dtype=_wide(device), device=device)
            self._weight = state["weight"]


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def divergence(
    figures: tuple[float, float] | None, training: Sequence[EncodedRows], tasks: Sequence[TaskConfig]
) -> dict[str, float] | None:
    """`{"train_loss", "limit"}` of a training that diverged with a finite loss, as result.json has it; else None.

    The task's mean loss of the last epoch is then more than three times the larger of two: its loss of the first batch,
    before any update, and the loss of scores that are all zero, without class weights and label smoothing.

    Args:
        figures: of `EpochLoss`.
        training: one split per task.
    """
    if figures is None:
        return None
    first, last = figures
    references = [first]
    for rows in training:
        assert rows.labels is not None
        task = tasks[rows.task]
        references.append(kind_of(task).zero_score_loss(task, rows.labels, rows.choice_counts))
    limit = _DIVERGED * max(references)
    return {"train_loss": last, "limit": limit} if last > limit else None

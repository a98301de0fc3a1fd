"""The mean training loss of an epoch: each batch is weighted by its examples in all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion.training.gathering import gathered


class EpochLoss:
    """Running sums in double precision, of the whole loss and of the task's own, without synchronising a device.

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

"""The training loss: non-finite values, the epoch mean and divergence, without synchronizing the device at each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusion.config.task import TaskConfig
from fusion.data.encode import EncodedRows
from fusion.errors import LossNotFinite
from fusion.tasks.table import kind_of
from fusion.training.processes import gathered

_SHOWN = 8  # examples in a message
_DIVERGED = 3.0  # factor in `divergence`
_NOT_FALLEN = 0.95  # factor in `not_learned`


class Losses:
    """The training losses since the last check."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, int, Tensor, str]] = []  # scalar loss, step, example indices, split

    def add(self, loss: Tensor, step: int, rows: Tensor, split: str) -> None:
        self._seen.append((loss, step, rows, split))

    def broken(self) -> bool:
        """Return whether a loss of this process is not finite."""
        return bool(self._seen) and not bool(torch.stack([loss for loss, *_ in self._seen]).isfinite().all())

    def check(self, distributed: bool) -> None:
        """Raise LossNotFinite if a loss since the last call is NaN or infinite. Collective: called on all ranks."""
        seen, self._seen = self._seen, []
        values = torch.stack([loss for loss, *_ in seen]) if seen else torch.zeros(0)
        bad = [seen[n] for n in (~values.isfinite()).nonzero().flatten().tolist()]
        if distributed:
            found_any = torch.tensor(float(bool(bad)), device=values.device)
            torch.distributed.all_reduce(found_any)
            if not found_any.item():
                return
        own = [(step, loss.item(), rows.tolist(), split) for loss, step, rows, split in bad]
        found = [entry for of_process in gathered(own) for entry in of_process]
        if found:
            step, loss, rows, split = min(found, key=lambda entry: entry[0])
            shown = ", ".join(map(str, rows[:_SHOWN])) + (" …" if len(rows) > _SHOWN else "")
            raise LossNotFinite(f"the loss is {loss} at step {step} (examples {shown} of {split}, zero-based)")


class EpochLoss:
    """Mean total loss and task loss of an epoch; of its batches since the resume if a DDP run resumed within it."""

    def __init__(self) -> None:
        self._first: Tensor | float | None = None  # task loss of the run's first batch
        self.restart()

    def restart(self) -> None:
        """Start a new epoch."""
        self._sums: Any = 0.0  # (2,), total and task
        self._weight = 0.0

    def add(self, total: Tensor, task: Tensor, weight: float) -> None:
        """Add a batch: this process's shares of the mean losses (scalars), and the weight of all processes' examples."""
        parts = torch.stack([total, task]).detach().to(_wide(total.device))
        if self._first is None:
            self._first = parts[1]
        self._sums = self._sums + parts * weight
        self._weight += weight

    def mean(self) -> float | None:
        """Return the mean total loss, or `None` if no batch was seen. Collective: must be called on all ranks."""
        if not self._weight:
            return None
        totals = gathered(float(self._sums[0]))
        return sum(totals) / len(totals) / self._weight

    def figures(self) -> tuple[float, float] | None:
        """Return the task loss of the run's first batch and its mean over the last epoch. Collective."""
        own = None
        if self._weight and self._first is not None:
            own = float(self._first), float(self._sums[1]) / self._weight
        found = [figures for figures in gathered(own) if figures is not None]
        if not found:
            return None
        firsts, lasts = zip(*found, strict=True)
        return sum(firsts) / len(firsts), sum(lasts) / len(lasts)

    def state(self, processes: int) -> dict[str, Any]:
        first = None if self._first is None else float(self._first)
        sums = self._sums.tolist() if self._weight and processes == 1 else None
        return {"first": first, "sums": sums, "weight": self._weight}

    def resume(self, state: dict[str, Any], processes: int, device: torch.device) -> None:
        self._first = state["first"]
        if state["sums"] is not None and processes == 1:
            self._sums = torch.tensor(state["sums"], dtype=_wide(device), device=device)
            self._weight = state["weight"]


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def not_learned(
    figures: tuple[float, float] | None,
    training: Sequence[EncodedRows],
    tasks: Sequence[TaskConfig],
    scores: Mapping[str, float],
    labels: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """Return the signs that a run has not learned its task; empty if there are none.

    `{"score", "majority"}`: the task's first metric on its first validation split is not above that of predicting the
    most frequent label. `{"train_loss", "constant_loss"}`: the mean task loss of the last epoch is above 95 % of that of
    the best constant prediction. The first of multiple tasks is returned, as `task`.

    Args:
        figures: result of `EpochLoss.figures`, if the loss is unweighted and of a single task; else `None`.
        training: one split per task.
        scores: metrics of the best epoch, such as `validation/accuracy`.
        labels: of the evaluated examples, by validation split; the first split of each task is used.
    """
    for rows, task, (split, own) in zip(training, tasks, labels.items(), strict=True):
        kind, found = kind_of(task), dict[str, Any]()
        metric = f"{split}/{task.metrics[0]}"
        if constant := kind.constant(own):
            majority = kind.metrics(task, own, constant)[task.metrics[0]]
            if scores.get(metric, math.inf) <= majority:
                found |= {"metric": metric, "score": scores[metric], "majority": majority}
        if figures is not None:
            assert rows.labels is not None
            lowest = kind.constant_loss(task, rows.labels, rows.choice_counts)
            if figures[1] > _NOT_FALLEN * lowest:
                found |= {"train_loss": figures[1], "constant_loss": lowest}
        if found:
            return {"task": task.name, **found}
    return {}


def divergence(
    figures: tuple[float, float] | None, training: Sequence[EncodedRows], tasks: Sequence[TaskConfig]
) -> dict[str, float] | None:
    """Return `{"train_loss", "limit"}` for result.json if training diverged with a finite loss, else `None`.

    A run counts as diverged if the mean task loss of the last epoch exceeds three times the larger of the loss of the
    first batch, before any update, and the loss of all-zero logits, without class weights and label smoothing.

    `figures` is the result of `EpochLoss.figures`; `training` has one split per task.
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

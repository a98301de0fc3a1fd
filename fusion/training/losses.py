"""Find a loss that is not finite without synchronising the device at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion.errors import LossNotFinite
from fusion.training.gathering import gathered

_SHOWN = 8  # rows in a message


class Losses:
    """The losses since the last check."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, int, Tensor, str]] = []

    def add(self, loss: Tensor, step: int, rows: Tensor, split: str) -> None:
        """
        Args:
            loss: a scalar.
            rows: (B,), of the split.
        """
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

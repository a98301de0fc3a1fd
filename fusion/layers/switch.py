"""Adapters of multiple tasks in one slot, selected per row: a mixed-task batch in one pass.

Shapes: B rows, T tokens, D hidden size, N tasks, R the largest bottleneck size among their adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import NONLINEARITIES
from fusion.layers.slot_module import BatchContext, SlotModule


class TaskSwitch(SlotModule):
    """u = u_m(x), with m the row's entry of `batch.members`; 0 if that task has no adapter in this slot.

    Args:
        bank: the tasks' adapters of this slot; the tasks are its sources.
    """

    place: Tensor

    def __init__(self, bank: AdapterBank) -> None:
        super().__init__()
        self.bank = bank
        place = torch.full((bank.total,), -1)
        place[bank.source_positions] = torch.arange(len(bank))
        self.register_buffer("place", place)  # (tasks,): of each task's adapter in the bank, or -1

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D) -> u: (B, T, D).

        Raises:
            RuntimeError: `batch.members` is not set.
        """
        if batch.members is None:
            raise RuntimeError("a mixed-task batch needs members, the index of each row's adapter")
        bank, place = self.bank, self.place[batch.members]
        there, own = place >= 0, place.clamp(min=0)
        down = bank.down_weight.unflatten(0, (len(bank), bank.size))[own]  # (B, R, D)
        up = bank.up_weight.unflatten(1, (len(bank), bank.size)).transpose(0, 1)[own]  # (B, D, R)
        z = torch.baddbmm(bank.down_bias.view(len(bank), 1, -1)[own], x, down.transpose(1, 2))
        u = torch.baddbmm(bank.up_bias.unsqueeze(1)[own], self._activated(z, own), up.transpose(1, 2))
        return u * there.view(-1, 1, 1)

    def _activated(self, z: Tensor, own: Tensor) -> Tensor:
        """z: (B, T, R), own: (B,) -> (B, T, R), each row by its own adapter's non-linearity."""
        names = self.bank.nonlinearities
        if len(set(names)) == 1:
            return NONLINEARITIES[names[0]](z)
        kinds = sorted(set(names))
        kind = F.one_hot(torch.tensor([kinds.index(name) for name in names], device=z.device), len(kinds))[own]
        parts = [NONLINEARITIES[name](z) * kind[:, n].view(-1, 1, 1) for n, name in enumerate(kinds)]
        return torch.stack(parts).sum(0)

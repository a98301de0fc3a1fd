"""Mixtures of source adapters whose weights do not depend on the token.

Shapes: B rows, T tokens, D hidden size, N adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusion.layers.attention import masked_softmax
from fusion.layers.bank import AdapterBank
from fusion.layers.slot_module import BatchContext, SlotModule


class StaticMixture(SlotModule):
    """o = Σ_n softmax(w)_n u_n, one learned weight per source and slot; initially uniform."""

    def __init__(self, bank: AdapterBank) -> None:
        super().__init__()
        self.bank = bank
        self.weight = nn.Parameter(torch.zeros(len(bank)))

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D) -> o: (B, T, D)."""
        return _mix(self.bank, self.weight, x, batch)


class MeanMixture(SlotModule):
    """o = (1/N) Σ_n u_n over the sources that are on; no parameters."""

    def __init__(self, bank: AdapterBank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D) -> o: (B, T, D)."""
        return _mix(self.bank, x.new_zeros(len(self.bank)), x, batch)


def _mix(bank: AdapterBank, scores: Tensor, x: Tensor, batch: BatchContext) -> Tensor:
    p = masked_softmax(scores, bank.on(batch.sources_on))
    if batch.record is not None:
        batch.record(batch.place, bank.spread(p.expand(*x.shape[:-1], len(bank))))
    return bank.weighted_sum(p, bank.bottlenecks(x))

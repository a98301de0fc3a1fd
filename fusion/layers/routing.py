"""Routing of tokens to sources without training, by the directions that each source reads.

Shapes: B texts, T tokens, N adapters, R bottleneck size, D_in and D_out input and output sizes of the slot.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion.layers.attention import score_dtype
from fusion.layers.bank import AdapterBank
from fusion.layers.slot_module import BatchContext, SlotModule


class Arrow(SlotModule):
    """Arrow routing (Ostapenko et al. 2024, arXiv 2405.11157), without parameters:

        z_n = |v_n · x|,   p = softmax of the k largest z_n / τ,   o = Σ_n p_n u_n

    The prototype v_n is the first right singular vector of the linear map of source n, Wu_n Wd_n: the unit vector in
    D_in that it changes most. For bottleneck adapters, this ignores the nonlinearity and the biases.

    Args:
        bank: frozen sources of this slot.
        top_k: k; with fewer active sources, all of them.
        temperature: τ.
    """

    prototypes: Tensor

    def __init__(self, bank: AdapterBank, top_k: int = 3, temperature: float = 1.0) -> None:
        super().__init__()
        self.bank = bank
        self.top_k = top_k
        self.temperature = temperature
        self.register_buffer("prototypes", prototypes(bank))  # (N, D_in)

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D_in) -> o: (B, T, D_out)."""
        bank, on = self.bank, self.bank.on(batch)
        scores = F.linear(x, self.prototypes).abs().to(score_dtype(x)) / self.temperature
        off = torch.finfo(scores.dtype).min
        if on is not None:
            scores = scores.masked_fill(~on, off)
        best = scores.topk(min(self.top_k, len(bank)), dim=-1)
        p = torch.full_like(scores, off).scatter(-1, best.indices, best.values).softmax(-1)
        p = p if on is None else p * on
        if batch.record is not None:
            batch.record(batch.slot, bank.spread(p))
        return bank.weighted_sum(p, bank.bottlenecks(x))


def prototypes(bank: AdapterBank) -> Tensor:
    """Return the first right singular vector of Wu_n Wd_n for each adapter: (N, D_in), of norm 1."""
    with torch.no_grad():
        down = bank.down_weight.double().unflatten(0, (len(bank), bank.size))  # (N, R, D_in)
        up = bank.up_weight.double().unflatten(1, (len(bank), bank.size)).transpose(0, 1)  # (N, D_out, R)
        # With Wd^T = Q L, the right singular vectors of Wu Wd = (Wu L^T) Q^T are Q times those of the small Wu L^T.
        basis, lower = torch.linalg.qr(down.mT)  # (N, D_in, R), (N, R, R)
        right = torch.linalg.svd(up @ lower.mT, full_matrices=False).Vh  # (N, R, R)
        return (basis @ right[:, :1].mT).squeeze(-1).to(bank.down_weight.dtype)

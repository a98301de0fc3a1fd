"""AdapterFusion (Pfeiffer et al. 2021, §3.2): attention over source adapters, per token and layer.

Shapes: B rows, T tokens, D hidden size, N adapters, R bottleneck size.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fusion.layers.bank import AdapterBank
from fusion.layers.filling import BatchContext, Filling


class AdapterFusion(Filling):
    """Decides for every token how much to listen to each source adapter.

    The paper's equation, with u_n the change that source n would make (before any residual):

        q   = Wq x + bq
        k_n = Wk u_n + bk
        v_n = Wv u_n
        p   = softmax_n( dropout(q · k_n) / τ )
        o   = Σ_n p_n v_n

    It is computed folded, with the same result up to rounding and without the 2·N products of
    size D × D: from g = Wkᵀ q follow the scores q·k_n = g·u_n + bk·q, and o = Wv Σ_n p_n u_n.
    `AdapterBank` says how both come from the bottlenecks alone. There is no 1/√D, as in the paper.

    Args:
        bank: the frozen sources of this slot.
        hidden_size: D.
        value_matrix: whether there is a Wv (the paper's variant without one has v_n = u_n).
        temperature: τ.
        dropout: on the scores, before the softmax; 0 unless asked for.
    """

    undecayed: ClassVar[tuple[str, ...]] = ("value.weight",)  # its pull is towards I, not towards 0

    def __init__(
        self,
        bank: AdapterBank,
        hidden_size: int,
        value_matrix: bool = True,
        temperature: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.bank = bank
        self.temperature = temperature
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False) if value_matrix else None
        self.dropout = nn.Dropout(dropout)
        for projection in (self.query, self.key):
            nn.init.normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)
        if self.value is not None:
            # The identity, with 1e-6 off the diagonal.
            nn.init.constant_(self.value.weight, 1e-6)
            with torch.no_grad():
                self.value.weight.fill_diagonal_(1.0)

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D) -> o: (B, T, D)."""
        z = self.bank.bottlenecks(x)
        q = self.query(x)
        scores = self.bank.inner_products(q @ self.key.weight, z)
        if self.training:
            # The same for every n, so the softmax drops it, unless dropout acts on the scores. It
            # stays in training all the same: without it bk would get no gradient, and DDP raises.
            scores = scores + (q @ self.key.bias).unsqueeze(-1)
        p = masked_softmax(self.dropout(scores) / self.temperature, self.bank.on(batch.sources_on))
        if batch.record is not None:
            batch.record(batch.place, self.bank.spread(p))
        mixed = self.bank.weighted_sum(p, z)
        return mixed if self.value is None else self.value(mixed)

    def losses(self) -> dict[str, Tensor]:
        """‖Wv − I‖²_F, which keeps the values near what the sources say (§3.2)."""
        if self.value is None:
            return {}
        weight = self.value.weight
        identity = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
        return {"value_penalty": (weight - identity).pow(2).sum()}


def masked_softmax(scores: Tensor, on: Tensor | None) -> Tensor:
    """scores: (..., N), on: (N,) bool or None -> softmax over the N that are on; all off gives zeros."""
    if on is None:
        return scores.softmax(-1)
    return scores.masked_fill(~on, float("-inf")).softmax(-1).nan_to_num(0.0)

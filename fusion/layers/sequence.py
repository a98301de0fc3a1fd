"""Sequence-level AdapterFusion: one attention distribution per text, from the mean of its tokens.

Shapes: B rows, T tokens, D hidden size, N adapters, R bottleneck size.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fusion.layers.attention import AdapterFusion, MergedFusion
from fusion.layers.heads import pool
from fusion.layers.slot_module import BatchContext


class SequenceFusion(AdapterFusion):
    """Attention over the source adapters, equal for all tokens of a text.

    With x̄ the mean of x over the text's real tokens, and the parameters of `AdapterFusion`:

        p    = softmax_n( dropout(q(x̄) · k_n(u_n(x̄))) / τ )
        o_t  = Σ_n p_n Wv u_n(x_t)

    A text without any real token has x̄ = 0.
    """

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D) -> o: (B, T, D)."""
        text = mean_token(x, batch)
        p = self._weights(text, self.bank.bottlenecks(text), batch)
        if batch.record is not None:
            batch.record(batch.place, self.bank.spread(p).expand(-1, x.shape[1], -1))
        mixed = self.bank.weighted_sum(p, self.bank.bottlenecks(x))
        return mixed if self.value is None else self.value(mixed)

    def merged(self) -> MergedSequenceFusion:
        """The same function for inference, up to rounding, without products of size D × D."""
        return MergedSequenceFusion(self)


class MergedSequenceFusion(MergedFusion):
    """A trained `SequenceFusion` merged as in `MergedFusion`: 2·N·R·D multiply-adds per token."""

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D) -> o: (B, T, D)."""
        width = len(self.sources) * self.sources.size
        p, _ = self._weights(mean_token(x, batch), batch)
        if batch.record is not None:
            batch.record(batch.place, self.sources.spread(p).expand(-1, x.shape[1], -1))
        z = self.sources.activated(F.linear(x, self.into[:width], self.into_bias[:width]))
        return (p.unsqueeze(-1) * z).flatten(-2) @ self.out + p @ self.out_bias


def mean_token(x: Tensor, batch: BatchContext) -> Tensor:
    """x: (B, T, D) -> (B, 1, D), the mean over each text's real tokens; 0 without real tokens."""
    return pool(x, batch.attention_mask, "mean").unsqueeze(1)

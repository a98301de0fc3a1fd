"""AdapterFusion (Pfeiffer et al. 2021, §3.2): attention over source adapters in each slot, per token or per text.

Shapes: B texts, T tokens, N adapters, R bottleneck size, K rank of query and key. D_in and D_out are the input and
output sizes of the slot; both equal D, the hidden size, except for slots at linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion.layers.bank import AdapterBank, Sources
from fusion.layers.heads import pool
from fusion.layers.products import ordered_product
from fusion.layers.slot_module import BatchContext, SlotModule


class AdapterFusion(SlotModule):
    """Token-level attention over the updates of the source adapters.

    The paper's equation, with u_n the update of source n (before any residual):

        q   = Wq x + bq
        k_n = Wk u_n + bk
        v_n = Wv u_n
        p   = softmax_n( dropout(q · k_n) / τ )
        o   = Σ_n p_n v_n

    The computation is rearranged to avoid 2·N products of size D × D, with the same result up to rounding. The scores
    are q·k_n = g·u_n + bk·q with g = Wkᵀ q, and o = Wv Σ_n p_n u_n. With u_n = Wu_n z_n + bu_n, both need only the
    bottlenecks z and products of tokens with a chain of matrices,

        g·u_n = z_n · (Wu_nᵀ Wkᵀ (Wq x + bq)) + bu_n · Wkᵀ (Wq x + bq)
        o     = Wv Wu [p_n z_n]_n + Wv Σ_n p_n bu_n

    which `ordered_product` computes in the cheapest order: for batches with many tokens, it multiplies the matrices
    first. As in the paper, scores are not divided by √D.

    With a low rank, Wq and Wk have K rows and far fewer parameters.

    With a null source, the softmax has one more entry, for a source whose update is 0: u_0 = v_0 = 0 and k_0 = bk. A
    token can then take less than a full update, Σ_n p_n < 1. With a prior π over the sources,

        p_n = π_n exp(q·k_n / τ) / Σ_m π_m exp(q·k_m / τ)

    and Wq is initialized to 0, so that initially p = π for every token. In training, the loss term `prior_penalty` is
    KL(p ‖ π), averaged over the non-padding tokens of a text. Sources that are not active have π_n = 0, and the rest of π
    is normalized.

    Raises ValueError if the rank is below 1, or the prior has the wrong size or an entry that is not positive.

    Args:
        bank: frozen sources of this slot: bottleneck adapters, or LoRAs, which have neither biases nor σ.
        value_matrix: whether to use Wv; if false, v_n = u_n (a variant in the paper).
        temperature: τ.
        dropout: dropout probability of the attention scores, before the softmax.
        rank: K, at least 1. If `None`, D_in as in the paper.
        null_source: whether the softmax includes a source without an update.
        prior: π, one probability for each of the bank's `total` sources, and one for the null source if there is one. If
            `None`, there is no such term.
    """

    undecayed = ("value.weight",)  # `value_penalty` regularizes it towards I, not 0
    in_float32 = ("log_prior",)
    log_prior: Tensor | None

    def __init__(
        self,
        bank: AdapterBank,
        *,
        value_matrix: bool = True,
        temperature: float = 1.0,
        dropout: float = 0.0,
        rank: int | None = None,
        null_source: bool = False,
        prior: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if rank is not None and rank < 1:
            raise ValueError(f"rank {rank}: expected at least 1")
        if prior is not None and (len(prior) != bank.total + null_source or min(prior) <= 0):
            raise ValueError(f"prior {list(prior)}: expected {bank.total + null_source} positive numbers")
        self.bank = bank
        self.temperature = temperature
        self.null_source = null_source
        log_prior = None
        if prior is not None:
            entries = [*bank.positions, *([bank.total] if null_source else [])]
            log_prior = torch.tensor(prior).log()[entries]
        self.register_buffer("log_prior", log_prior)  # (N,), or (N + 1,) with the null source
        self.query = nn.Linear(bank.input_size, rank or bank.input_size)
        self.key = nn.Linear(bank.output_size, rank or bank.input_size)
        self.value = identity_matrix(bank.output_size) if value_matrix else None
        self.dropout = nn.Dropout(dropout)
        for projection in (self.query, self.key):
            nn.init.normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)
        if prior is not None:
            nn.init.zeros_(self.query.weight)

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D_in) -> o: (B, T, D_out)."""
        z = self.bank.bottlenecks(x)
        p = self._weights(x, z, batch)
        if batch.record is not None:
            batch.record(batch.slot, self.bank.spread(p).expand(*x.shape[:-1], -1))
        if self.value is None:
            return self.bank.weighted_sum(p, z)
        p = p.to(z.dtype)
        value, mixed = self.value.weight.T, (p.unsqueeze(-1) * z).flatten(-2)
        return ordered_product(mixed, [self.bank.up_weight.T, value], p @ (self.bank.up_bias @ value))

    def _weights(self, x: Tensor, z: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D_in), bottlenecks z: (B, T, N, R) -> p: (B, T, N), or (B, 1, N) if equal for all tokens."""
        query, key, up = self.query, self.key, torch.cat([self.bank.up_weight, self.bank.up_bias.T], dim=1)
        products = ordered_product(x, [query.weight.T, key.weight, up], (query.bias @ key.weight) @ up)
        through, biases = products.split([z.shape[-2:].numel(), len(self.bank)], dim=-1)
        scores = (z * through.unflatten(-1, z.shape[-2:])).sum(-1, dtype=score_dtype(z)) + biases
        scores = F.pad(scores, (0, int(self.null_source)))
        if self.training:
            # bk·q is equal for all n, so it cancels in the softmax unless dropout is applied to the scores. It is always
            # computed in training, since DDP raises if bk has no gradient.
            scores = scores + (x @ (key.bias @ query.weight) + query.bias @ key.bias).unsqueeze(-1)
        scores = self.dropout(scores) / self.temperature
        return attention_weights(scores, self.bank.on(batch), self.log_prior, self.null_source, batch)

    def merged(self) -> MergedFusion:
        """Return an equivalent module for inference, equal up to rounding, without products of size D × D."""
        return MergedFusion(self)

    def losses(self) -> dict[str, Tensor]:
        """Return `value_penalty`, ‖Wv − I‖²_F, which regularizes the values towards the sources' updates (§3.2)."""
        return {} if self.value is None else {"value_penalty": value_penalty(self.value.weight)}


class MergedFusion(SlotModule):
    """Trained fusion for inference, with its D × D matrices merged into the matrices of the adapters.

    With M = Wkᵀ Wq and c = Wkᵀ bq, the scores are computed from terms that are linear in x,

        g · u_n = z_n · (Wu_nᵀ M x + Wu_nᵀ c) + (bu_n · M x + bu_n · c)

    as is the down-projection before σ, so one product computes all three. bk·q, equal for all n, cancels in the
    softmax. The values become Σ_n p_n (Wv Wu_n z_n + Wv bu_n). This takes 3·N·R·D + 2·N·D multiply-adds per token
    instead of 3·N·R·D + 3·D² + 2·N·D. The trained fusion is not changed.
    """

    in_float32 = ("null_score",)
    into: Tensor
    into_bias: Tensor
    out: Tensor
    out_bias: Tensor
    null_score: Tensor | None

    def __init__(self, fusion: AdapterFusion) -> None:
        super().__init__()
        bank = fusion.bank
        self.sources = Sources(bank.nonlinearities, bank.size, bank.positions, bank.total)
        self.null_source = fusion.null_source
        log_prior = fusion.log_prior
        self.register_buffer("null_score", log_prior[-1:] if log_prior is not None and self.null_source else None)
        dtype = bank.up_weight.dtype
        with torch.no_grad():  # in float64, so that merged matrices are rounded only once
            query, query_bias = fusion.query.weight.double(), fusion.query.bias.double()
            key = fusion.key.weight.double() / fusion.temperature
            up, up_bias = bank.up_weight.double(), bank.up_bias.double()
            upwards = torch.cat([up.T, up_bias]) @ key.T  # (N·R + N, D): [Wu_nᵀ; bu_n] Wkᵀ
            into = torch.cat([bank.down_weight.double(), upwards @ query])
            into_bias = torch.cat([bank.down_bias.double(), upwards @ query_bias])
            if log_prior is not None:
                into_bias[-len(bank) :] += log_prior[: len(bank)]
            if fusion.value is not None:
                value = fusion.value.weight.double()
                up, up_bias = value @ up, up_bias @ value.T
        self.register_buffer("into", into.to(dtype))  # (2·N·R + N, D_in)
        self.register_buffer("into_bias", into_bias.to(dtype))  # (2·N·R + N,)
        self.register_buffer("out", up.to(dtype).T.contiguous())  # (N·R, D_out)
        self.register_buffer("out_bias", up_bias.to(dtype))  # (N, D_out)

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D_in) -> o: (B, T, D_out)."""
        count, width = len(self.sources), len(self.sources) * self.sources.size
        p, z = self._weights(x, batch)
        if batch.record is not None:
            batch.record(batch.slot, self.sources.spread(p))
        p = p.to(z.dtype)
        mixed = (p.unsqueeze(-1) * z).reshape(-1, width)
        out = torch.addmm(p.reshape(-1, count) @ self.out_bias, mixed, self.out)
        return out.view(*x.shape[:-1], -1)

    def _weights(self, x: Tensor, batch: BatchContext) -> tuple[Tensor, Tensor]:
        """x: (B, T, D_in) -> p: (B, T, N) and z: (B, T, N, R)."""
        count, width = len(self.sources), len(self.sources) * self.sources.size
        down, through, bias = F.linear(x, self.into, self.into_bias).split([width, width, count], dim=-1)
        z = self.sources.activated(down)
        scores = (z * through.unflatten(-1, (count, -1))).sum(-1, dtype=score_dtype(z)) + bias
        on = self.sources.on(batch)
        if not self.null_source:
            return masked_softmax(scores, on), z
        null = scores.new_zeros(1) if self.null_score is None else self.null_score
        scores = torch.cat([scores, null.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
        on = None if on is None else F.pad(on, (0, 1), value=True)
        return masked_softmax(scores, on)[..., :count], z


class SequenceFusion(AdapterFusion):
    """Sequence-level attention over the source adapters, equal for all tokens of a text.

    With x̄ the mean of x over the text's non-padding tokens, and the parameters of `AdapterFusion`:

        p    = softmax_n( dropout(q(x̄) · k_n(u_n(x̄))) / τ )
        o_t  = Σ_n p_n Wv u_n(x_t)

    If a text has only padding tokens, x̄ = 0.
    """

    def _weights(self, x: Tensor, z: Tensor, batch: BatchContext) -> Tensor:
        text = mean_token(x, batch)
        return super()._weights(text, self.bank.bottlenecks(text), batch)

    def merged(self) -> MergedSequenceFusion:
        """Return an equivalent module for inference, equal up to rounding, without products of size D × D."""
        return MergedSequenceFusion(self)


class MergedSequenceFusion(MergedFusion):
    """Trained `SequenceFusion` merged as in `MergedFusion`: 2·N·R·D multiply-adds per token."""

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D) -> o: (B, T, D)."""
        width = len(self.sources) * self.sources.size
        p, _ = self._weights(mean_token(x, batch), batch)
        if batch.record is not None:
            batch.record(batch.slot, self.sources.spread(p).expand(-1, x.shape[1], -1))
        z = self.sources.activated(F.linear(x, self.into[:width], self.into_bias[:width]))
        p = p.to(z.dtype)
        return (p.unsqueeze(-1) * z).flatten(-2) @ self.out + p @ self.out_bias


def attention_weights(
    scores: Tensor, on: Tensor | None, log_prior: Tensor | None, null_source: bool, batch: BatchContext
) -> Tensor:
    """Compute p: (B, T, N) from scores (B, T, N), or (B, T, N + 1) with a null source, and add `prior_penalty`.

    on: mask of active sources, (N,) or (B, 1, N). log_prior: (N,) or (N + 1,).
    """
    if on is not None:
        on = F.pad(on, (0, int(null_source)), value=True)
    if log_prior is not None:
        scores = scores + log_prior
    p = masked_softmax(scores, on)
    if log_prior is not None and batch.add_loss is not None:
        prior = masked_softmax(log_prior, on)
        least = torch.finfo(p.dtype).tiny  # so that 0 log 0 is 0, also in the backward pass
        kl = (p * (p.clamp(min=least).log() - prior.clamp(min=least).log())).sum(-1, keepdim=True)
        kl = kl.expand(-1, batch.attention_mask.shape[1], -1)  # a text may have one distribution for all tokens
        batch.add_loss("prior_penalty", pool(kl, batch.attention_mask, "mean").squeeze(-1))
    return p[..., : p.shape[-1] - null_source]


def identity_matrix(size: int) -> nn.Linear:
    """Return a value matrix: the identity with 1e-6 off the diagonal."""
    value = nn.Linear(size, size, bias=False)
    nn.init.constant_(value.weight, 1e-6)
    with torch.no_grad():
        value.weight.fill_diagonal_(1.0)
    return value


def value_penalty(weight: Tensor) -> Tensor:
    """Return ‖Wv − I‖²_F."""
    identity = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
    return (weight - identity).pow(2).sum()


def mean_token(x: Tensor, batch: BatchContext) -> Tensor:
    """Average x (B, T, D) over each text's non-padding tokens, if any, else return 0: (B, 1, D)."""
    return pool(x, batch.attention_mask, "mean").unsqueeze(1)


def score_dtype(z: Tensor) -> torch.dtype:
    """Return the dtype of the scores and of their softmax, at least float32."""
    return torch.promote_types(z.dtype, torch.float32)


def masked_softmax(scores: Tensor, on: Tensor | None) -> Tensor:
    """Compute the softmax of scores (..., N) where the bool mask `on` is True; zeros if it is False everywhere.

    on: (N,) or (B, 1, N).
    """
    if on is None:
        return scores.softmax(-1)
    # With -inf, the gradients of scores that are all masked would be NaN.
    return scores.masked_fill(~on, torch.finfo(scores.dtype).min).softmax(-1) * on

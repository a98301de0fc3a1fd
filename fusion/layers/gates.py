"""Gates: weights of the sources that are computed from a layer's input, for all slots of the layer or of the model.

Attention in each slot computes keys from the updates of the sources there. A gate has parameters for each source
instead, so that its cost does not depend on the number and the sizes of the slots.

Shapes: B texts, T tokens, N sources with and without an adapter in a slot, D_in input size of the gate, K rank of query
and keys, D_out output size of a slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion.layers.attention import attention_weights, identity_matrix, mean_token, score_dtype, value_penalty
from fusion.layers.bank import AdapterBank
from fusion.layers.slot_module import BatchContext, SlotModule


class Gate(nn.Module):
    """Base class of gates.

    Attributes:
        place: stack and index of the layer whose input the gate reads, once per batch; `None` for the gate of a single
            slot, which reads the slot's input.
    """

    def __init__(self, place: tuple[str, int] | None) -> None:
        super().__init__()
        self.place = place

    @property
    def key(self) -> str:
        """Key of the weights in `BatchContext.gates`."""
        stack, layer = self.place or ("", 0)
        return f"{stack}.{layer}"

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D_in) -> weights: (B, T, N), or (B, 1, N) if equal for all tokens."""
        raise NotImplementedError


class AttentionGate(Gate):
    """p_n = softmax_n( dropout(q · k_n) / τ ) with q = Wq x + bq and a learned key k_n for each source.

    It is the attention of `AdapterFusion` with keys that do not depend on the token. Keys are initialized to 0, so that
    initially p is uniform or, with a prior, equal to it. The key of the null source is 0. See `AdapterFusion` for the
    prior and its penalty. Raises ValueError if the rank is below 1 or the prior has the wrong size.

    Args:
        place: see `Gate`.
        input_size: D_in.
        total: N.
        rank: K. If `None`, D_in.
        per_text: whether x is replaced by its mean over the text's non-padding tokens.
        temperature, dropout, null_source, prior: see `AdapterFusion`.
    """

    in_float32 = ("log_prior",)
    log_prior: Tensor | None

    def __init__(
        self,
        place: tuple[str, int] | None,
        input_size: int,
        total: int,
        *,
        rank: int | None = None,
        per_text: bool = False,
        temperature: float = 1.0,
        dropout: float = 0.0,
        null_source: bool = False,
        prior: Sequence[float] | None = None,
    ) -> None:
        super().__init__(place)
        if rank is not None and rank < 1:
            raise ValueError(f"rank {rank}: expected at least 1")
        if prior is not None and len(prior) != total + null_source:
            raise ValueError(f"prior {list(prior)}: expected {total + null_source} numbers")
        self.per_text, self.temperature, self.null_source = per_text, temperature, null_source
        self.query = nn.Linear(input_size, rank or input_size)
        self.keys = nn.Parameter(torch.zeros(total, rank or input_size))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.query.weight, std=0.02)
        nn.init.zeros_(self.query.bias)
        self.register_buffer("log_prior", None if prior is None else torch.tensor(prior).log())

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        if self.per_text:
            x = mean_token(x, batch)
        scores = F.linear(self.query(x), self.keys).to(score_dtype(x))
        scores = self.dropout(F.pad(scores, (0, int(self.null_source)))) / self.temperature
        return attention_weights(scores, sources_on(batch), self.log_prior, self.null_source, batch)


class LinearGate(Gate):
    """p = softmax(W x) + b, the gate of LoRA-Flow (Wang et al. 2024, arXiv 2402.11455).

    W and b are initialized to 0, so that initially p is uniform. The softmax is over the active sources, and inactive
    ones have weight 0. The weights need not sum to 1 and may be negative.
    """

    def __init__(self, place: tuple[str, int] | None, input_size: int, total: int) -> None:
        super().__init__(place)
        self.weight = nn.Parameter(torch.zeros(total, input_size))
        self.bias = nn.Parameter(torch.zeros(total))

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        on = sources_on(batch)
        p = attention_weights(F.linear(x, self.weight).to(score_dtype(x)), on, None, False, batch) + self.bias
        return p if on is None else p * on


class GatedMixture(SlotModule):
    """o = Wv Σ_n p_n u_n, with the weights p of a gate and Wv = I without a value matrix.

    The sources without an adapter in this slot have no update, u_n = 0; their weight is not distributed to others.

    Args:
        bank: frozen sources of this slot.
        gate: shared with other slots if it has a place.
        value_matrix: whether to use Wv, initialized to the identity (1e-6 off the diagonal).
    """

    undecayed = ("value.weight",)  # `value_penalty` regularizes it towards I, not 0

    def __init__(self, bank: AdapterBank, gate: Gate, value_matrix: bool = False) -> None:
        super().__init__()
        self.bank = bank
        self.gate = gate
        self.value = identity_matrix(bank.output_size) if value_matrix else None

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D_in) -> o: (B, T, D_out)."""
        bank = self.bank
        p = self.gate(x, batch) if self.gate.place is None else batch.gates[self.gate.key]
        p, on = p[..., bank.source_positions], bank.on(batch)
        p = p if on is None else p * on
        if batch.record is not None:
            batch.record(batch.slot, bank.spread(p).expand(*x.shape[:-1], -1))
        out = bank.weighted_sum(p, bank.bottlenecks(x))
        return out if self.value is None else self.value(out)

    def losses(self) -> dict[str, Tensor]:
        """Return `value_penalty`, see `AdapterFusion`."""
        return {} if self.value is None else {"value_penalty": value_penalty(self.value.weight)}


def sources_on(batch: BatchContext) -> Tensor | None:
    """Return the mask of active sources: bool (N,), (B, 1, N) if it differs between texts, `None` if all are."""
    on = batch.sources_on
    return on if on is None or on.ndim == 1 else on.unsqueeze(1)

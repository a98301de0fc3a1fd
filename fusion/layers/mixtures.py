"""Compositions of source adapters whose weights do not depend on the token: mixtures, ScaLearn, averages.

Shapes: B texts, T tokens, D hidden size, N adapters, R bottleneck size, W size of a scale: D or 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion.layers.attention import masked_softmax
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.slot_module import BatchContext, LinearMap, SlotModule


class MeanMixture(SlotModule):
    """o = (1/N) Σ_n u_n over the active sources, without parameters."""

    def __init__(self, bank: AdapterBank) -> None:
        super().__init__()
        self.bank = bank

    def _scores(self, x: Tensor) -> Tensor:
        """Return the scores before the softmax, (N,)."""
        return x.new_zeros(len(self.bank))

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D) -> o: (B, T, D)."""
        bank = self.bank
        p = masked_softmax(self._scores(x), bank.on(batch))
        if batch.record is not None:
            batch.record(batch.slot, bank.spread(p.expand(*x.shape[:-1], len(bank))))
        return bank.weighted_sum(p, bank.bottlenecks(x))

    def linear_map(self) -> LinearMap | None:
        p = masked_softmax(self._scores(self.bank.up_bias), None)
        return self.bank.linear_map(p.unsqueeze(1))


class StaticMixture(MeanMixture):
    """o = Σ_n softmax(w)_n u_n, with one learned weight per source and slot, initially uniform."""

    def __init__(self, bank: AdapterBank) -> None:
        super().__init__(bank)
        self.weight = nn.Parameter(torch.zeros(bank.count))

    def _scores(self, x: Tensor) -> Tensor:
        return self.weight[self.bank.places]


class ScaLearn(SlotModule):
    """o = Σ_n ω_n ⊙ u_n (Frohmann et al. 2023, arXiv 2310.01217), with learned scales.

    There is one scale per source and dimension (W = D) or per source (W = 1). Scales are unconstrained: they need not
    sum to 1 and may be negative. Since u_n is linear in its up-projection, the scales are applied to the up-projection
    once per batch, so a token costs no more than in `MeanMixture`.

    The recorded weights are equal for all tokens: ω_n for W = 1, else the mean of |ω_n| over the dimensions. They do
    not sum to 1. Raises ValueError if ω has the wrong shape.

    Args:
        scales: ω, see `initial_scales`: (N, W), or (total, W) if shared between slots.
        shared: whether ω has an entry for every source, including sources without an adapter in this slot.
    """

    undecayed = ("scales",)  # weight decay towards 0 would disable the sources

    def __init__(self, bank: AdapterBank, scales: nn.Parameter, shared: bool = False) -> None:
        super().__init__()
        allowed = [(bank.total if shared else bank.count, width) for width in (bank.output_size, 1)]
        if scales.shape not in allowed:
            raise ValueError(f"scales {tuple(scales.shape)}: expected {allowed[0]}, or {allowed[1]} for one per source")
        self.bank = bank
        self.scales = scales
        self.shared = shared

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D) -> o: (B, T, D)."""
        bank, on = self.bank, self.bank.on(batch)
        scales = self.scales[bank.source_positions if self.shared else bank.places]  # (N, W)
        if batch.record is not None:
            uniform = scales.shape[1] == 1
            recorded = scales.squeeze(1) if uniform else scales.abs().mean(1)
            recorded = recorded if on is None else recorded * on
            batch.record(batch.slot, bank.spread(recorded.expand(*x.shape[:-1], len(bank))))
        up = (bank.up_weight.unflatten(1, (len(bank), -1)) * scales.T.unsqueeze(-1)).flatten(1)  # (D, N·R)
        up_bias = scales * bank.up_bias  # (N, D)
        z = bank.bottlenecks(x)
        if on is None:
            return F.linear(z.flatten(-2), up, up_bias.sum(0))
        active = on.to(z.dtype)  # (N,) or (B, 1, N)
        return F.linear((z * active.unsqueeze(-1)).flatten(-2), up) + active @ up_bias

    def linear_map(self) -> LinearMap | None:
        return self.bank.linear_map(self.scales[self.bank.source_positions if self.shared else self.bank.places])


def initial_scales(count: int, width: int) -> nn.Parameter:
    """Return the initial ω (count, width): 1/count plus noise N(0, 0.001), close to the mean of the sources."""
    return nn.Parameter(torch.empty(count, width).normal_(1.0 / count, 0.001))


def average(
    adapters: Sequence[BottleneckAdapter], merge: str = "mean", density: float = 1.0, seed: int = 0
) -> BottleneckAdapter:
    """Return a new adapter whose weights and biases are merged from those of the given adapters.

    Each tensor is merged for itself, so this is not the mean of the outputs: units of different adapters may be
    permuted, there is σ in between, and in a product of two merged matrices every source multiplies every other. The
    dropout probability is taken from the first adapter. Raises ValueError if there is no adapter, or adapters differ in
    sizes, biases, nonlinearity or scaling.

    Args:
        merge: `mean`; `ties` or `dare`, see `ties` and `dare`.
        density, seed: of `ties` and `dare`.
    """
    kinds: set[tuple[Any, ...]] = set()
    for a in adapters:
        scaling = "learned" if isinstance(a.scaling, Tensor) else a.scaling
        kinds.add((a.down.in_features, *a.up.weight.shape, a.up.bias is not None, a.nonlinearity, scaling))
    if len(kinds) != 1:
        raise ValueError(f"expected adapters with equal sizes and settings, not {sorted(kinds, key=str)}")
    ((input_size, output_size, bottleneck_size, bias, nonlinearity, scaling),) = kinds
    dropout = adapters[0].dropout.p
    mean = BottleneckAdapter(input_size, bottleneck_size, nonlinearity, scaling, dropout, "bert", output_size, bias)
    mean.to(adapters[0].up.weight)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            values = torch.stack([a.get_parameter(name) for a in adapters])
            if merge == "ties":
                parameter.copy_(ties(values, density))
            elif merge == "dare":
                parameter.copy_(dare(values, density, draws))
            else:
                parameter.copy_(values.mean(0))
    return mean


def ties(values: Tensor, density: float) -> Tensor:
    """Merge tensors (N, ...) as in TIES (Yadav et al. 2023, arXiv 2306.01708, algorithm 1), with λ = 1.

    Of each tensor, the fraction `density` of the entries with the largest magnitude is kept. The sign of each entry is
    that of the sum, and the entry is the mean of the kept values with this sign.
    """
    kept = torch.zeros_like(values).flatten(1)
    count = max(1, int(density * kept.shape[1]))
    largest = values.flatten(1).abs().topk(count, dim=1).indices
    kept = kept.scatter(1, largest, values.flatten(1).gather(1, largest)).view_as(values)
    agrees = kept.sign() == kept.sum(0).sign()
    agrees &= kept != 0
    return (kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def dare(values: Tensor, density: float, draws: torch.Generator) -> Tensor:
    """Return the mean of tensors (N, ...) whose entries are kept with probability `density` and divided by it.

    DARE (Yu et al. 2024, arXiv 2311.03099).
    """
    kept = torch.rand(values.shape, generator=draws).to(values.device) < density
    return (values * kept / density).mean(0)


class FrozenAdapter(SlotModule):
    """Frozen adapter, whose weights are buffers. `sources_on` has no effect."""

    def __init__(self, adapter: BottleneckAdapter) -> None:
        super().__init__()
        self.bank = AdapterBank([adapter], [0], 1)

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D) -> u: (B, T, D)."""
        return self.bank.weighted_sum(x.new_ones(1), self.bank.bottlenecks(x))

    def linear_map(self) -> LinearMap | None:
        return self.bank.linear_map(self.bank.up_bias.new_ones(1, 1))

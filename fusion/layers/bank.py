"""Frozen adapters of one slot as stacked matrices, which avoids a loop over the adapters.

Shapes: B texts, T tokens, D_in and D_out input and output sizes, N adapters, R their largest bottleneck size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion.layers.bottleneck import NONLINEARITIES, BottleneckAdapter
from fusion.layers.slot_module import BatchContext, LinearMap, SlotModule


class Sources(nn.Module):
    """Sources with an adapter in a slot, and σ_n, the nonlinearities between the two projections.

    Args:
        positions: index of each adapter's source (0 to `total` - 1), in ascending order.
        total: number of sources, with or without an adapter in this slot.
        folds: fold of each adapter, or -1 for the main adapter of its source, see `BatchContext.folds`. Each source has
            either its main adapter only, or also one adapter per fold. If `None`, all are main adapters.
    """

    source_positions: Tensor
    places: Tensor
    folds: Tensor | None
    has_folds: Tensor | None

    def __init__(
        self,
        nonlinearities: Sequence[str],
        size: int,
        positions: Sequence[int],
        total: int,
        folds: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.nonlinearities = list(nonlinearities)
        self.size = size
        self.total = total
        self.positions = list(positions)
        present = sorted(set(positions))
        self.count = len(present)  # number of sources with an adapter in this slot
        self.register_buffer("source_positions", torch.tensor(list(positions)))
        # Index of each adapter's source among the `count` sources.
        self.register_buffer("places", torch.tensor([present.index(position) for position in positions]))
        of_folds = [position for position, fold in zip(positions, folds or (), strict=False) if fold >= 0]
        in_folds = None if folds is None else [position in of_folds for position in positions]
        self.register_buffer("folds", None if folds is None else torch.tensor(list(folds)))
        self.register_buffer("has_folds", None if in_folds is None else torch.tensor(in_folds))

    def __len__(self) -> int:
        return len(self.nonlinearities)

    def activated(self, down: Tensor) -> Tensor:
        """Apply the nonlinearities: down-projections (B, T, N·R) -> z: (B, T, N, R)."""
        down = down.unflatten(-1, (len(self), self.size))
        runs = [(name, len(list(members))) for name, members in groupby(self.nonlinearities)]
        if len(runs) == 1:
            return NONLINEARITIES[runs[0][0]](down)
        parts = down.split([length for _, length in runs], dim=-2)
        return torch.cat([NONLINEARITIES[name](part) for (name, _), part in zip(runs, parts, strict=True)], dim=-2)

    def on(self, batch: BatchContext) -> Tensor | None:
        """Return the mask of active adapters: bool (N,), (B, 1, N) if it differs between texts, `None` if all are."""
        on = None if batch.sources_on is None else batch.sources_on[..., self.source_positions]
        if self.folds is not None and self.has_folds is not None:
            if batch.folds is None:
                chosen = self.folds < 0
            else:
                chosen = (self.folds == batch.folds.unsqueeze(-1)) | ~self.has_folds
            on = chosen if on is None else on & chosen
        return on if on is None or on.ndim == 1 else on.unsqueeze(1)

    def spread(self, p: Tensor) -> Tensor:
        """Add weights p (B, T, N) up by source: (B, T, total), with 0 for sources without an adapter in this slot."""
        return p.new_zeros(*p.shape[:-1], self.total).index_add(-1, self.source_positions, p)


class AdapterBank(Sources):
    """Frozen adapters as stacked matrices, registered as buffers so that they are not trainable.

    With z_n = σ_n(x Wd_nᵀ + bd_n), the output of an adapter is u_n = Wu_n z_n + bu_n, with its scaling merged into Wu
    and bu. Compositions use inner products of u_n with a vector g and weighted sums of u_n, computed from z alone:

        g · u_n       = z_n · (Wu_nᵀ g) + bu_n · g
        Σ_n p_n u_n   = Σ_n Wu_n (p_n z_n) + Σ_n p_n bu_n

    so N·R instead of N·D_out values per token are saved for the backward pass. Smaller bottlenecks are zero-padded,
    which is exact since every σ maps 0 to 0, and missing biases (LoRA) are 0. Frozen adapters have no dropout. Raises
    ValueError if there is no adapter, the indices are invalid, or the adapters have different sizes.

    Args:
        adapters: adapters of this slot, in the order of the sources.
        sources: index of each adapter's source, see `Sources`.
        total, folds: see `Sources`.
    """

    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor

    def __init__(
        self,
        adapters: Sequence[BottleneckAdapter],
        sources: Sequence[int],
        total: int,
        folds: Sequence[int] | None = None,
    ) -> None:
        if not adapters:
            raise ValueError("a bank needs at least one adapter")
        distinct = set(sources) if folds is None else set(zip(sources, folds, strict=True))
        if (
            not len(sources) == len(adapters) == len(distinct)
            or sorted(sources) != list(sources)
            or sources[-1] >= total
        ):
            raise ValueError(f"sources {list(sources)}: expected {len(adapters)} increasing indices below {total}")
        sizes = {(adapter.down.in_features, adapter.up.out_features) for adapter in adapters}
        if len(sizes) != 1:
            raise ValueError(f"adapters have different sizes (input, output): {sorted(sizes)}")
        ((input_size, output_size),) = sizes
        size = max(adapter.down.out_features for adapter in adapters)
        super().__init__([adapter.nonlinearity for adapter in adapters], size, sources, total, folds)
        self.input_size = input_size
        self.output_size = output_size
        down, down_bias, up, up_bias = [], [], [], []
        with torch.no_grad():
            for adapter in adapters:
                padding, scaling = size - adapter.down.out_features, adapter.scaling
                down.append(F.pad(adapter.down.weight, (0, 0, 0, padding)))
                up.append(F.pad(adapter.up.weight * scaling, (0, padding)))
                zero = adapter.down.weight.new_zeros
                down_bias.append(zero(size) if adapter.down.bias is None else F.pad(adapter.down.bias, (0, padding)))
                up_bias.append(zero(output_size) if adapter.up.bias is None else adapter.up.bias * scaling)
        self.register_buffer("down_weight", torch.cat(down))  # (N·R, D_in)
        self.register_buffer("down_bias", torch.cat(down_bias))  # (N·R,)
        self.register_buffer("up_weight", torch.cat(up, dim=1))  # (D_out, N·R)
        self.register_buffer("up_bias", torch.stack(up_bias))  # (N, D_out)

    def bottlenecks(self, x: Tensor) -> Tensor:
        """Compute the bottleneck activations of every adapter: x (B, T, D_in) -> z: (B, T, N, R)."""
        return self.activated(F.linear(x, self.down_weight, self.down_bias))

    def weighted_sum(self, p: Tensor, z: Tensor) -> Tensor:
        """Compute Σ_n p_n u_n: p (B, T, N), (B, 1, N) or (N,), z (B, T, N, R) -> (B, T, D_out)."""
        p = p.to(z.dtype)
        return F.linear((p.unsqueeze(-1) * z).flatten(-2), self.up_weight) + p @ self.up_bias

    @torch.no_grad()
    def linear_map(self, scales: Tensor) -> LinearMap | None:
        """Return Σ_n ω_n ⊙ u_n with all adapters active as a map of x, given ω (N, D_out) or (N, 1), if every σ is the
        identity.
        """
        if set(self.nonlinearities) != {"identity"} or self.folds is not None:
            return None
        scales = scales.double()
        up = self.up_weight.double().unflatten(1, (len(self), -1)) * scales.T.unsqueeze(-1)  # (D_out, N, R)
        bias = up.flatten(1) @ self.down_bias.double() + (scales * self.up_bias.double()).sum(0)
        return LinearMap(up.flatten(1) @ self.down_weight.double(), bias)


class TaskSwitch(SlotModule):
    """u = u_m(x), with m the text's entry of `batch.members`; 0 if task m has no adapter in this slot.

    The tasks are the sources of the bank.
    """

    index: Tensor

    def __init__(self, bank: AdapterBank) -> None:
        super().__init__()
        self.bank = bank
        index = torch.full((bank.total,), -1)
        index[bank.source_positions] = torch.arange(len(bank))
        self.register_buffer("index", index)  # (tasks,): index of each task's adapter in the bank, or -1

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D) -> u: (B, T, D). Raises RuntimeError if `batch.members` is not set."""
        if batch.members is None:
            raise RuntimeError("a mixed-task batch requires members, the adapter index of each text")
        bank, index = self.bank, self.index[batch.members]
        exists, own = index >= 0, index.clamp(min=0)
        down = bank.down_weight.unflatten(0, (len(bank), bank.size))[own]  # (B, R, D)
        up = bank.up_weight.unflatten(1, (len(bank), bank.size)).transpose(0, 1)[own]  # (B, D, R)
        z = torch.baddbmm(bank.down_bias.view(len(bank), 1, -1)[own], x, down.transpose(1, 2))
        u = torch.baddbmm(bank.up_bias.unsqueeze(1)[own], self._activated(z, own), up.transpose(1, 2))
        return u * exists.view(-1, 1, 1)

    def _activated(self, z: Tensor, own: Tensor) -> Tensor:
        """Apply the nonlinearity of each text's adapter: z (B, T, R), adapter index own (B,) -> (B, T, R)."""
        names = self.bank.nonlinearities
        if len(set(names)) == 1:
            return NONLINEARITIES[names[0]](z)
        return torch.stack([NONLINEARITIES[names[n]](text) for n, text in zip(own.tolist(), z, strict=True)])

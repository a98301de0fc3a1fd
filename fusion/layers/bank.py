"""N frozen adapters of one slot, stacked to avoid a loop over them.

Shapes: B rows, T tokens, D_in and D_out widths of the input and of the update, N adapters,
R the largest bottleneck size among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion.layers.bottleneck import NONLINEARITIES, BottleneckAdapter
from fusion.layers.slot_module import BatchContext, SlotModule


class Sources(nn.Module):
    """The sources with an adapter in a slot, and the non-linearities between the two projections.

    Args:
        nonlinearities: σ_n, one per adapter, in the sources' order.
        size: R.
        positions: for each adapter, the position of its source among all `total` sources.
        total: the number of sources, with or without an adapter in this slot.
    """

    source_positions: Tensor

    def __init__(self, nonlinearities: Sequence[str], size: int, positions: Sequence[int], total: int) -> None:
        super().__init__()
        self.nonlinearities = list(nonlinearities)
        self.size = size
        self.total = total
        self.register_buffer("source_positions", torch.tensor(list(positions)))

    def __len__(self) -> int:
        return len(self.nonlinearities)

    def activated(self, down: Tensor) -> Tensor:
        """down: (B, T, N·R), the down-projections -> z: (B, T, N, R)."""
        down = down.unflatten(-1, (len(self), self.size))
        runs = [(name, len(list(members))) for name, members in groupby(self.nonlinearities)]
        if len(runs) == 1:
            return NONLINEARITIES[runs[0][0]](down)
        parts = down.split([length for _, length in runs], dim=-2)
        return torch.cat([NONLINEARITIES[name](part) for (name, _), part in zip(runs, parts, strict=True)], dim=-2)

    def on(self, sources_on: Tensor | None) -> Tensor | None:
        """sources_on: (total,) bool or None -> its entries for the adapters of this slot: (N,)."""
        return None if sources_on is None else sources_on[self.source_positions]

    def spread(self, p: Tensor) -> Tensor:
        """p: (B, T, N) -> (B, T, total), zero for sources without an adapter in this slot."""
        return p.new_zeros(*p.shape[:-1], self.total).index_copy(-1, self.source_positions, p)


class AdapterBank(Sources):
    """Frozen adapters as stacked matrices, held as buffers so that they cannot train.

    With z_n = σ_n(x Wd_nᵀ + bd_n), an adapter's output is u_n = Wu_n z_n + bu_n, its scaling folded into Wu and bu.
    A composition needs inner products of the u_n with some g and a weighted sum of them; both follow from z without
    computing u:

        g · u_n       = z_n · (Wu_nᵀ g) + bu_n · g
        Σ_n p_n u_n   = Σ_n Wu_n (p_n z_n) + Σ_n p_n bu_n

    so N·R numbers per token are kept instead of N·D_out. Smaller bottlenecks are padded with zero rows, which is exact
    because every σ maps 0 to 0, and a missing bias (LoRA) is zero. Frozen adapters have no dropout.

    Args:
        adapters: of this slot, in the sources' order.
        sources: for each adapter, the position of its source among all `total` sources.
        total: the number of sources, with or without an adapter in this slot.

    Raises:
        ValueError: no adapter, wrong positions, or different widths.
    """

    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor

    def __init__(self, adapters: Sequence[BottleneckAdapter], sources: Sequence[int], total: int) -> None:
        if not adapters:
            raise ValueError("a bank needs at least one adapter")
        if len(sources) != len(adapters) or sorted(set(sources)) != list(sources) or sources[-1] >= total:
            raise ValueError(f"source positions {list(sources)} do not fit {len(adapters)} adapters of {total} sources")
        widths = {(adapter.down.in_features, adapter.up.out_features) for adapter in adapters}
        if len(widths) != 1:
            raise ValueError(f"adapters of different widths (input, output): {sorted(widths)}")
        ((input_size, output_size),) = widths
        size = max(adapter.down.out_features for adapter in adapters)
        super().__init__([adapter.nonlinearity for adapter in adapters], size, sources, total)
        self.input_size = input_size
        self.output_size = output_size
        down, down_bias, up, up_bias = [], [], [], []
        with torch.no_grad():
            for adapter in adapters:
                room, scaling = size - adapter.down.out_features, adapter.scaling
                bias = adapter.down.bias is not None
                down.append(F.pad(adapter.down.weight, (0, 0, 0, room)))
                up.append(F.pad(adapter.up.weight * scaling, (0, room)))
                zero = adapter.down.weight.new_zeros
                down_bias.append(F.pad(adapter.down.bias, (0, room)) if bias else zero(size))
                up_bias.append(adapter.up.bias * scaling if bias else zero(output_size))
        self.register_buffer("down_weight", torch.cat(down))  # (N·R, D_in)
        self.register_buffer("down_bias", torch.cat(down_bias))  # (N·R,)
        self.register_buffer("up_weight", torch.cat(up, dim=1))  # (D_out, N·R)
        self.register_buffer("up_bias", torch.stack(up_bias))  # (N, D_out)

    def bottlenecks(self, x: Tensor) -> Tensor:
        """x: (B, T, D_in) -> z: (B, T, N, R), the bottleneck activations of every adapter."""
        return self.activated(F.linear(x, self.down_weight, self.down_bias))

    def inner_products(self, g: Tensor, z: Tensor) -> Tensor:
        """g: (B, T, D_out), z: (B, T, N, R) -> g · u_n: (B, T, N)."""
        through = (g @ self.up_weight).unflatten(-1, (len(self), self.size))
        return (z * through).sum(-1) + F.linear(g, self.up_bias)

    def weighted_sum(self, p: Tensor, z: Tensor) -> Tensor:
        """p: (B, T, N) or (N,), z: (B, T, N, R) -> Σ_n p_n u_n: (B, T, D_out)."""
        return F.linear((p.unsqueeze(-1) * z).flatten(-2), self.up_weight) + p @ self.up_bias


class TaskSwitch(SlotModule):
    """u = u_m(x), with m the row's entry of `batch.members`; 0 if that task has no adapter in this slot.

    The tasks are the sources of the bank.
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

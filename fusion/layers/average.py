"""Weight averaging: one adapter whose weights are the means of those of adapters of one shape.

Shapes: B rows, T tokens, D hidden size, R bottleneck size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.slot_module import BatchContext, SlotModule


def average(adapters: Sequence[BottleneckAdapter]) -> BottleneckAdapter:
    """A new adapter whose weights and biases are the means of those given.

    This is not the mean of the outputs, because of σ between the two projections. Dropout is that of the first.

    Raises:
        ValueError: no adapter, or they differ in sizes, biases, non-linearity or scaling.
    """
    kinds = {
        (
            a.down.in_features,
            *a.up.weight.shape,
            a.up.bias is not None,
            a.nonlinearity,
            "learned" if isinstance(a.scaling, Tensor) else a.scaling,
        )
        for a in adapters
    }
    if len(kinds) != 1:
        raise ValueError(f"expected adapters of one kind, not {sorted(kinds, key=str)}")
    ((input_size, output_size, bottleneck_size, bias, nonlinearity, scaling),) = kinds
    dropout = adapters[0].dropout.p
    mean = BottleneckAdapter(
        input_size, bottleneck_size, nonlinearity, scaling, dropout, output_size=output_size, bias=bias
    )
    mean.to(adapters[0].up.weight)
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            parameter.copy_(torch.stack([a.get_parameter(name) for a in adapters]).mean(0))
    return mean


class FrozenAdapter(SlotModule):
    """One frozen adapter: its weights are buffers. `sources_on` has no effect."""

    def __init__(self, adapter: BottleneckAdapter) -> None:
        super().__init__()
        self.bank = AdapterBank([adapter], [0], 1)

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D) -> u: (B, T, D)."""
        return self.bank.weighted_sum(x.new_ones(1), self.bank.bottlenecks(x))

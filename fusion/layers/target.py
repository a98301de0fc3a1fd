"""A trainable adapter of the target task beside a composition of frozen ones.

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from torch import Tensor

from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.slot_module import BatchContext, SlotModule


class WithTargetAdapter(SlotModule):
    """o + u_target: a composition of frozen sources, and an adapter that trains.

    With an adapter initialized to zero (`zero_up`), it is initially the composition alone. Recorded weights are those
    of the composition; the target's adapter is not a source.

    Args:
        composition: computes o.
        target: computes u_target, and trains.
    """

    def __init__(self, composition: SlotModule, target: BottleneckAdapter) -> None:
        super().__init__()
        self.composition = composition
        self.target = target
        parts = (("composition", composition), ("target", target))
        self.undecayed = tuple(f"{part}.{name}" for part, slot_module in parts for name in slot_module.undecayed)

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D) -> o + u_target: (B, T, D)."""
        out: Tensor = self.composition(x, batch)
        return out + self.target(x, batch)

    def losses(self) -> dict[str, Tensor]:
        """The losses of the composition."""
        return self.composition.losses()

    def merged(self) -> WithTargetAdapter:
        """The same with the composition merged."""
        return WithTargetAdapter(self.composition.merged(), self.target)

"""The contract of whatever fills a slot: it maps what the slot reads to the update that the slot adds.

Shapes: B rows, T tokens, N source adapters. The widths D_in and D_out are both the hidden size, but for a slot at a
linear layer, which has that layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import Parameter

Recorder = Callable[[str, Tensor], None]
"""Called with a slot's name and the weights (B, T, N) that its slot module gave to the sources."""


@dataclass(frozen=True)
class BatchContext:
    """What a slot module may need beyond `x`. The model makes it before the backbone runs.

    attention_mask: (B, T), 1 for a real token.
    layers_on: for each layer whether its slots are filled in this batch (AdapterDrop, Rücklé et al. 2021);
        empty: all are.
    members: (B,), which of several adapters each row is meant for; None where a slot module has only one.
    sources_on: (N,) bool, which sources take part; None means all.
    record: takes the source weights out; None when nobody asked.
    place: the slot that is being filled, for the recorder.
    """

    attention_mask: Tensor
    layers_on: tuple[bool, ...] = ()
    members: Tensor | None = None
    sources_on: Tensor | None = None
    record: Recorder | None = None
    place: str = ""


class SlotModule(nn.Module):
    """Base of all that fills a slot. Keeps no state between calls."""

    undecayed: tuple[str, ...] = ()
    """Parameters that take no weight decay, beyond the biases, which never do."""

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D_in) -> the update to add: (B, T, D_out)."""
        raise NotImplementedError

    def losses(self) -> dict[str, Tensor]:
        """Named scalars that this slot module adds to the loss, before their weight."""
        return {}

    def merged(self) -> SlotModule:
        """What gives the same change at inference with less work; itself, where there is no such thing."""
        return self


def parameters_of(slot_modules: Mapping[str, SlotModule]) -> dict[str, Parameter]:
    """What slot modules train, by slot and own name: `0.feedforward.down.weight`. What slots share stands there once."""
    named = (
        (f"{slot}.{name}", p)
        for slot, slot_module in slot_modules.items()
        for name, p in slot_module.named_parameters()
    )
    first: dict[Parameter, str] = {}
    for name, parameter in named:
        first.setdefault(parameter, name)
    return {name: parameter for parameter, name in first.items()}

"""The interface of slot modules, which map the slot's input to the update that the slot adds.

Shapes: B rows, T tokens, N source adapters. The widths D_in and D_out are the hidden size, except at a linear layer,
whose widths they are.
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
    """Inputs of a slot module beside `x`. The model sets it before the backbone runs.

    Attributes:
        attention_mask: (B, T), 1 for a real token.
        layers_on: for each layer whether its slots are active in this batch (AdapterDrop, Rücklé et al. 2021); empty:
            all are.
        members: (B,), the index of each row's adapter, for slot modules with the adapters of multiple tasks.
        sources_on: (N,) bool, the sources that take part; None: all.
        record: called with the source weights; None: not recorded.
        place: the name of the slot, for `record`.
    """

    attention_mask: Tensor
    layers_on: tuple[bool, ...] = ()
    members: Tensor | None = None
    sources_on: Tensor | None = None
    record: Recorder | None = None
    place: str = ""


class SlotModule(nn.Module):
    """Base class of slot modules. `forward` keeps no state between calls."""

    undecayed: tuple[str, ...] = ()
    """Parameters without weight decay, beside the biases, which never have it."""

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D_in) -> the update to add: (B, T, D_out)."""
        raise NotImplementedError

    def losses(self) -> dict[str, Tensor]:
        """Named scalars to add to the loss, before weighting."""
        return {}

    def merged(self) -> SlotModule:
        """An equivalent module for faster inference; by default the module itself."""
        return self


def parameters_of(slot_modules: Mapping[str, SlotModule]) -> dict[str, Parameter]:
    """The parameters of slot modules, by slot and name: `0.feedforward.down.weight`. Shared ones appear once."""
    named = (
        (f"{slot}.{name}", p)
        for slot, slot_module in slot_modules.items()
        for name, p in slot_module.named_parameters()
    )
    first: dict[Parameter, str] = {}
    for name, parameter in named:
        first.setdefault(parameter, name)
    return {name: parameter for parameter, name in first.items()}

"""The interface of slot modules, which map the slot's input to the update that the slot adds.

Shapes: B texts, T tokens, N source adapters. D_in and D_out are the input and output sizes of the slot: the hidden
size, except at a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import Parameter

# Called with the name of a slot and the attention weights of its sources (B, T, N).
Recorder = Callable[[str, Tensor], None]
# Called with the name of a loss term and its value for each text (B,), before weighting.
LossRecorder = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class BatchContext:
    """Additional inputs of a slot module. The model sets them before the backbone runs.

    Attributes:
        attention_mask: (B, T), 0 for padding tokens.
        layers_on: whether the slots of each layer are active in this batch (AdapterDrop, Rücklé et al. 2021). If empty,
            all are active.
        members: (B,), adapter index of each text, for slot modules with the adapters of multiple tasks.
        sources_on: (N,) or (B, N) bool mask of active sources. If `None`, all sources are active.
        folds: (B,), for each text the fold whose adapter replaces the main adapter of a source that has one per fold,
            or -1 for the main adapter. If `None`, all texts use the main adapters.
        record: called with the attention weights, unless `None`.
        add_loss: called with loss terms that depend on the texts, unless `None`.
        slot: name of the slot, passed to `record`.
        gates: weights of the gates that have computed them in this batch, by their key, see `fusion.layers.gates`.
    """

    attention_mask: Tensor
    layers_on: tuple[bool, ...] = ()
    members: Tensor | None = None
    sources_on: Tensor | None = None
    folds: Tensor | None = None
    record: Recorder | None = None
    add_loss: LossRecorder | None = None
    slot: str = ""
    gates: dict[str, Tensor] = field(default_factory=dict)


class LinearMap(NamedTuple):
    """The map x -> W x + b, in float64."""

    weight: Tensor  # (D_out, D_in)
    bias: Tensor  # (D_out,)


class SlotModule(nn.Module):
    """Base class of slot modules. `forward` keeps no state between calls."""

    undecayed: tuple[str, ...] = ()
    """Parameters excluded from weight decay, in addition to biases."""

    in_float32: tuple[str, ...] = ()
    """Buffers that stay float32 in a backbone of a lower precision."""

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D_in) -> update: (B, T, D_out)."""
        raise NotImplementedError

    def losses(self) -> dict[str, Tensor]:
        """Return named loss terms (scalars), before weighting."""
        return {}

    def merged(self) -> SlotModule:
        """Return an equivalent module for faster inference; by default the module itself."""
        return self

    def linear_map(self) -> LinearMap | None:
        """Return the update as a linear map of x if all sources are active and it is one, else `None`."""
        return None


def parameters_of(slot_modules: Mapping[str, SlotModule]) -> dict[str, Parameter]:
    """Return the parameters of slot modules by name, such as `0.feedforward.down.weight`. Shared ones appear once."""
    first: dict[Parameter, str] = {}
    for slot, slot_module in slot_modules.items():
        for name, parameter in slot_module.named_parameters():
            first.setdefault(parameter, f"{slot}.{name}")
    return {name: parameter for parameter, name in first.items()}

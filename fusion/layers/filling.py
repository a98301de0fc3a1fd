"""The one contract: whatever fills a slot maps the stream to the change that is added to it.

Shapes: B rows, T tokens, D hidden size, N source adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

Recorder = Callable[[str, Tensor], None]
"""Called with a slot's name and the weights (B, T, N) that its filling gave to the sources."""


@dataclass(frozen=True)
class BatchContext:
    """What a filling may need beyond `x`. The model makes it before the backbone runs.

    attention_mask: (B, T), 1 for a real token.
    first_layer: the slots of all layers below stay empty in this batch (AdapterDrop, Rücklé et al. 2021).
    members: (B,), which of several adapters each row is meant for; None where a filling has only one.
    sources_on: (N,) bool, which sources take part; None means all.
    record: takes the source weights out; None when nobody asked.
    place: the slot that is being filled, for the recorder.
    """

    attention_mask: Tensor
    first_layer: int = 0
    members: Tensor | None = None
    sources_on: Tensor | None = None
    record: Recorder | None = None
    place: str = ""


class Filling(nn.Module):
    """Base of all that fills a slot. Keeps no state between calls."""

    undecayed: tuple[str, ...] = ()
    """Parameters that take no weight decay, beyond the biases, which never do."""

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D) -> the change to add: (B, T, D)."""
        raise NotImplementedError

    def losses(self) -> dict[str, Tensor]:
        """Named scalars that this filling adds to the loss, before their weight."""
        return {}

    def merged(self) -> Filling:
        """What gives the same change at inference with less work; itself, where there is no such thing."""
        return self

"""A slot: a place in the backbone where the stream may be changed.

Shapes: B rows, T tokens, D hidden size, I the width of what the sublayer's last product reads,
W the width of a slot's state (D or 2·D).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fusion.layers.filling import BatchContext, Filling


def layer_and_site(slot: str) -> tuple[int, str]:
    """`4.feedforward` -> (4, "feedforward")."""
    layer, _, site = slot.partition(".")
    return int(layer), site


class CurrentBatch:
    """What the model hands to all its slots before the backbone runs.

    The backbone's own modules pass no keyword through to the place where a slot sits, hence this
    one shared reference. It stays as it is until the next batch, so that a layer that is computed
    again for its gradient sees the same.

    Attributes:
        context: what the fillings may need.
        entry: the name of the lowest slot, below which all is frozen; None: no slot.
        prefix: (B, T, W), what `entry` would have got from below, where it is known already.
        stop: end the pass at `entry`, with what it got, as an `EntryReached`.
    """

    def __init__(self) -> None:
        self.context: BatchContext | None = None
        self.entry: str | None = None
        self.prefix: Tensor | None = None
        self.stop = False


class EntryReached(Exception):
    """Not an error: the pass got to the lowest slot, and that was all that was asked for."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state


class PostNormSlot(nn.Module):
    """The end of a post-norm sublayer, `LN(h + a)`, with room for a change u: `LN(h + u + a)`.

    It takes the place of the backbone's own output module (BERT, RoBERTa, XLM-R, Electra), and
    keeps that module's three parts under their own names, so that the backbone's tensors are
    called what they were. With a the sublayer's input and h = dropout(W·…), the filling reads

        `output`: x = h            (Houlsby et al. 2019)
        `normed`: x = LN(h + a)    (Pfeiffer et al. 2021; the same LN, twice)

    Its *state* is all that it needs from below: h + a, and for `output` also h.

    Args:
        sublayer_output: a module with `dense`, `dropout` and `LayerNorm`.
        name: `LAYER.SITE`, such as `0.feedforward`.
        filling: what changes the stream here. It is not registered: the model owns it.
        reads: output or normed.
        current: where the model puts each batch's context.

    Raises:
        ValueError: `reads` is unknown.
    """

    def __init__(
        self, sublayer_output: nn.Module, name: str, filling: Filling, reads: str, current: CurrentBatch
    ) -> None:
        super().__init__()
        if reads not in ("output", "normed"):
            raise ValueError(f"reads {reads!r}: expected output or normed")
        self.dense = sublayer_output.get_submodule("dense")
        self.dropout = sublayer_output.get_submodule("dropout")
        self.LayerNorm = sublayer_output.get_submodule("LayerNorm")
        self.name = name
        self.reads = reads
        self._current = current
        self.fill(filling)

    def fill(self, filling: Filling) -> None:
        """Put something else into the slot."""
        self._filling = (filling,)  # a tuple hides it from torch: the model's own table registers it

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """hidden_states: (B, T, I), input_tensor a: (B, T, D) -> (B, T, D)."""
        residual, h = self._state(hidden_states, input_tensor)
        x = self.LayerNorm(residual) if h is None else h
        return self.LayerNorm(residual + self._filling[0](x, self._context()))

    def _state(self, hidden_states: Tensor, input_tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """h + a and, where the filling reads it, h: each (B, T, D). Computed, or what the batch brought."""
        at_entry = self._current.entry == self.name
        if at_entry and self._current.prefix is not None:
            residual, *rest = self._current.prefix.chunk(1 if self.reads == "normed" else 2, dim=-1)
            return residual, (rest[0] if rest else None)
        h = self.dropout(self.dense(hidden_states))
        residual = h + input_tensor
        if at_entry and self._current.stop:
            raise EntryReached(residual if self.reads == "normed" else torch.cat([residual, h], dim=-1))
        return residual, (None if self.reads == "normed" else h)

    def _context(self) -> BatchContext:
        context = self._current.context
        if context is None:
            raise RuntimeError(f"slot {self.name} ran outside the model: nothing set the batch")
        return context if context.record is None else replace(context, place=self.name)

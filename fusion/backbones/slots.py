"""A slot: a place in the backbone where the stream may be changed.

Shapes: B rows, T tokens, D hidden size, I the width of what the sublayer's last product reads,
W the width of a slot's state (D or 2·D).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fusion.config import READS
from fusion.layers.slot_module import BatchContext, SlotModule

BEFORE_ATTENTION = "before_attention"
"""The site that is no end of a sublayer: it reads the layer's input, and nothing else."""


def layer_and_site(slot: str) -> tuple[int, str]:
    """`4.feedforward` -> (4, "feedforward")."""
    layer, _, site = slot.partition(".")
    return int(layer), site


def state_parts(slot: str, reads: str) -> int:
    """How many tensors of width D a slot needs from below: W / D."""
    return 1 if reads == "normed" or layer_and_site(slot)[1] == BEFORE_ATTENTION else 2


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


class Slot:
    """What all slots share: a name, something that fills it, and the batch that the model announced.

    Args:
        name: `LAYER.SITE`, such as `0.feedforward`.
        filling: what changes the stream here. It is not registered: the model owns it.
        current: where the model puts each batch's context.
    """

    def __init__(self, name: str, filling: SlotModule, current: CurrentBatch) -> None:
        self.name = name
        self._layer = layer_and_site(name)[0]
        self._current = current
        self.fill(filling)

    def fill(self, filling: SlotModule) -> None:
        """Put something else into the slot."""
        self._filling = (filling,)  # a tuple hides it from torch: the model's own table registers it

    @property
    def filling(self) -> SlotModule:
        return self._filling[0]

    @property
    def _context(self) -> BatchContext:
        context = self._current.context
        if context is None:
            raise RuntimeError(f"slot {self.name} ran outside the model: nothing set the batch")
        return context

    @property
    def empty(self) -> bool:
        """Whether this batch leaves the slot's layer out."""
        # Not a number to compare with: compiled, that would be a version for each number.
        on = self._context.layers_on
        return bool(on) and not on[self._layer]

    def change(self, x: Tensor) -> Tensor:
        """x: (B, T, D) -> what the filling adds: (B, T, D)."""
        context = self._context
        placed = context if context.record is None else replace(context, place=self.name)
        change: Tensor = self.filling(x, placed)
        return change


class BeforeAttentionSlot(Slot):
    """Lets self-attention read a changed stream, i + u, while the residual stays i.

    The filling reads the layer's input: x = i, which is its state too. The backbone's modules stay
    what they are: the change is made in a hook on the self-attention, whose first argument is i.
    """

    def attach(self, attention: nn.Module) -> None:
        """From now on, `attention` gets i + u."""
        attention.register_forward_pre_hook(self._before)

    def _before(self, attention: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, *others = inputs
        if self._current.stop and self._current.entry == self.name:
            raise EntryReached(hidden_states)
        return inputs if self.empty else (hidden_states + self.change(hidden_states), *others)


class PostNormSlot(Slot, nn.Module):
    """The end of a post-norm sublayer, `LN(h + a)`, with room for a change u: `LN(h + u + a)`.

    It takes the place of the backbone's own output module (BERT, RoBERTa, XLM-R, Electra), and
    keeps that module's three parts under their own names, so that the backbone's tensors are
    called what they were. With a the sublayer's input and h = dropout(W·…), the filling reads

        `output`: x = h            (Houlsby et al. 2019)
        `normed`: x = LN(h + a)    (Pfeiffer et al. 2021; the same LN, twice)
        `input`:  x = a            (beside the sublayer: He et al. 2021, parallel)

    Its *state* is all that it needs from below: h + a, and for `output` and `input` also x.

    Args:
        sublayer_output: a module with `dense`, `dropout` and `LayerNorm`.
        reads: output, normed or input.

    Raises:
        ValueError: `reads` is unknown.
    """

    def __init__(
        self, sublayer_output: nn.Module, name: str, filling: SlotModule, reads: str, current: CurrentBatch
    ) -> None:
        nn.Module.__init__(self)
        Slot.__init__(self, name, filling, current)
        if reads not in READS:
            raise ValueError(f"reads {reads!r}: expected one of {', '.join(READS)}")
        self.dense = sublayer_output.get_submodule("dense")
        self.dropout = sublayer_output.get_submodule("dropout")
        self.LayerNorm = sublayer_output.get_submodule("LayerNorm")
        self.reads = reads

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """hidden_states: (B, T, I), input_tensor a: (B, T, D) -> (B, T, D)."""
        residual, x = self._state(hidden_states, input_tensor)
        if not self.empty:
            residual = residual + self.change(self.LayerNorm(residual) if x is None else x)
        return self.LayerNorm(residual)

    def _state(self, hidden_states: Tensor, input_tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """h + a and, unless the filling reads its norm, x: each (B, T, D). Computed, or what the batch brought."""
        at_entry = self._current.entry == self.name
        if at_entry and self._current.prefix is not None:
            residual, *rest = self._current.prefix.chunk(state_parts(self.name, self.reads), dim=-1)
            return residual, (rest[0] if rest else None)
        h = self.dropout(self.dense(hidden_states))
        residual = h + input_tensor
        x = {"output": h, "input": input_tensor, "normed": None}[self.reads]
        if at_entry and self._current.stop:
            raise EntryReached(residual if x is None else torch.cat([residual, x], dim=-1))
        return residual, x

"""Slots: places in the backbone where an update may be added.

Slots are attached with hooks, so the backbone's modules and tensor names do not change.

Shapes: B rows, T tokens, D hidden size, D_in and D_out the widths of a linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from fusion.backbones.wirings import BeforeAttention, LinearLayer, PostNorm, PreNorm, Wiring
from fusion.layers.slot_module import BatchContext, SlotModule


@dataclass(frozen=True)
class SlotAddress:
    """Where a slot is. As text `4.feedforward`, `decoder.4.cross_attention`, `4.attention.query`.

    stack: empty for a backbone of one stack, else `encoder` or `decoder`.
    layer: its number in the stack, from 0.
    site: a key of the stack's sites, see `fusion.backbones.families`; may have dots.
    """

    stack: str
    layer: int
    site: str

    @classmethod
    def parse(cls, text: str) -> SlotAddress:
        """Read an address.

        Raises:
            ValueError: not an address.
        """
        match = re.fullmatch(r"(?:([^.\d][^.]*)\.)?(\d+)\.(.+)", text)
        if match is None:
            raise ValueError(f"slot {text!r}: expected LAYER.SITE or STACK.LAYER.SITE, such as 4.feedforward")
        return cls(match[1] or "", int(match[2]), match[3])

    def __str__(self) -> str:
        return f"{f'{self.stack}.' if self.stack else ''}{self.layer}.{self.site}"

    @property
    def path(self) -> str:
        """The path of a slot module in the model: dots of a site become underscores, as torch requires."""
        return str(SlotAddress(self.stack, self.layer, self.site.replace(".", "_")))


@dataclass
class CurrentBatch:
    """The batch that all slots of a model read, set before the backbone runs.

    The backbone's modules do not pass keywords through to a slot, hence this shared reference. It does not change
    until the next batch, so that a layer recomputed in the backward pass reads the same.

    Attributes:
        features: (B, T, D), the input of the lowest layer with a slot, if it is known.
        capture: end the pass at that layer by raising `BoundaryReached` with its input.
    """

    context: BatchContext | None = None
    features: Tensor | None = None
    capture: bool = False


class Slot:
    """Base class of slots: an address, a slot module and the current batch.

    Subclasses implement a wiring and hook themselves into a layer. Slots of a layer are attached in the order of
    `order`: a sublayer's output includes the updates at its linear layers, and the input that a sublayer's slot reads
    excludes the update of `BeforeAttention`.

    Args:
        module: computes the update; it is registered in the model, not here.
        reads: the module's input, one of the wiring's `reads`.
        current: holds the context of each batch.

    Raises:
        ValueError: the wiring does not have this reading.
    """

    order: ClassVar[int] = 1

    def __init__(
        self, address: SlotAddress, wiring: Any, module: SlotModule, reads: str, current: CurrentBatch
    ) -> None:
        if reads not in wiring.reads:
            raise ValueError(f"slot {address}: reads {reads!r}, expected one of {', '.join(wiring.reads)}")
        self.address = address
        self.name = str(address)
        self.wiring = wiring
        self.reads = reads
        self.module = module
        self._current = current
        self._kept: Tensor | None = None  # between two hooks of one pass only

    def attach(self, layer: nn.Module) -> None:
        """Register the hooks on a layer."""
        raise NotImplementedError

    @property
    def empty(self) -> bool:
        """Whether the slot is inactive in this batch."""
        # A tuple and not a number: compiled code would be specialized to each number.
        on = self._context.layers_on
        return bool(on) and not on[self.address.layer]

    @property
    def _context(self) -> BatchContext:
        context = self._current.context
        if context is None:
            raise RuntimeError(f"slot {self.name} ran outside the model: no batch is set")
        return context

    def update(self, x: Tensor) -> Tensor:
        """x: (B, T, D_in) -> the update: (B, T, D_out)."""
        context = self._context
        placed = context if context.record is None else replace(context, place=self.name)
        update: Tensor = self.module(x, placed)
        return update

    def _take(self) -> Tensor:
        kept, self._kept = self._kept, None
        assert kept is not None, f"slot {self.name}: the hooks ran in another order"
        return kept


class PostNormSlot(Slot):
    """See `PostNorm`. The update is added to h + r on its way into the norm."""

    wiring: PostNorm

    def attach(self, layer: nn.Module) -> None:
        if self.reads == "output":
            layer.get_submodule(self.wiring.output).register_forward_hook(self._keep_output)
        elif self.reads == "input":
            reader = layer.get_submodule(self.wiring.reader)
            reader.register_forward_pre_hook(self._keep_input, with_kwargs=True)
        layer.get_submodule(self.wiring.norm).register_forward_pre_hook(self._before_norm)

    def _keep_output(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._kept = _first(output)

    def _keep_input(self, module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        self._kept = hidden_states(inputs, keywords)

    def _before_norm(self, norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (stream,) = inputs
        x = self._take() if self.reads in ("output", "input") else stream
        if self.empty:
            return inputs
        if self.reads == "normed":
            x = norm.forward(stream)  # a call would run this hook again
        return (stream + self.update(x),)


class PreNormSlot(Slot):
    """See `PreNorm`. The update is added to h, whatever the backbone does with it: pre-norm, sandwich, parallel."""

    wiring: PreNorm

    def attach(self, layer: nn.Module) -> None:
        if self.reads != "output":
            layer.get_submodule(self.wiring.norm).register_forward_hook(self._keep)
        layer.get_submodule(self.wiring.output).register_forward_hook(self._after_output)

    def _keep(self, norm: nn.Module, inputs: tuple[Tensor], normed: Tensor) -> None:
        self._kept = inputs[0] if self.reads == "stream" else normed

    def _after_output(self, module: nn.Module, inputs: Any, h: Tensor) -> Tensor:
        x = h if self.reads == "output" else self._take()
        if self.empty:
            return h
        return h + self.update(x + h if self.reads == "stream" else x)


class BeforeAttentionSlot(Slot):
    """See `BeforeAttention`."""

    order = 2
    wiring: BeforeAttention

    def attach(self, layer: nn.Module) -> None:
        first, *others = (layer.get_submodule(path) for path in self.wiring.readers)
        first.register_forward_pre_hook(self._before_first, with_kwargs=True)
        for other in others:
            other.register_forward_pre_hook(self._before_other, with_kwargs=True)

    def _before_first(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        self._kept = None
        if self.empty:
            return inputs, keywords
        x = hidden_states(inputs, keywords)
        changed = x + self.update(x)
        if len(self.wiring.readers) > 1:
            self._kept = changed
        return with_hidden_states(inputs, keywords, changed)

    def _before_other(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        return (inputs, keywords) if self._kept is None else with_hidden_states(inputs, keywords, self._kept)


class LinearSlot(Slot):
    """See `LinearLayer`."""

    order = 0
    wiring: LinearLayer

    def attach(self, layer: nn.Module) -> None:
        layer.get_submodule(self.wiring.linear).register_forward_hook(self._after)

    def _after(self, linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output if self.empty else output + self.update(inputs[0])


_SLOTS: Mapping[type, type[Slot]] = {
    PostNorm: PostNormSlot,
    PreNorm: PreNormSlot,
    BeforeAttention: BeforeAttentionSlot,
    LinearLayer: LinearSlot,
}


def make_slot(address: SlotAddress, wiring: Wiring, module: SlotModule, reads: str, current: CurrentBatch) -> Slot:
    """The slot of a wiring, see `Slot`; attach it to a layer to use it."""
    return _SLOTS[type(wiring)](address, wiring, module, reads, current)


def hidden_states(inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """The hidden states that a module of transformers was called with: its first argument, or a keyword."""
    found: Tensor = inputs[0] if inputs else keywords["hidden_states"]
    return found


def with_hidden_states(
    inputs: tuple[Any, ...], keywords: dict[str, Any], states: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with other hidden states."""
    if inputs:
        return (states, *inputs[1:]), keywords
    return inputs, {**keywords, "hidden_states": states}


def _first(output: Any) -> Tensor:
    """The output without the attention weights that attention modules return beside it."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found

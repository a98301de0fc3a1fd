"""Slots: positions in the backbone at which a slot module adds an update.

Slots are attached with hooks, so the backbone's modules and tensor names do not change.

Shapes: B texts, T tokens, D hidden size, D_in and D_out input and output sizes of a linear layer (else D).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from fusion.backbones.sites import BeforeAttention, LinearLayer, PostNorm, PreNorm, Site
from fusion.layers.slot_module import BatchContext, SlotModule


@dataclass(frozen=True)
class SlotAddress:
    """Address of a slot, written as `4.feedforward`, `decoder.4.cross_attention` or `4.attention.query`.

    Attributes:
        stack: `encoder` or `decoder`; empty if the backbone has a single stack.
        layer: zero-based index of the layer in the stack.
        site: key of the stack's sites, see `fusion.backbones.families`; may contain dots.
    """

    stack: str
    layer: int
    site: str

    @classmethod
    def parse(cls, text: str) -> SlotAddress:
        """Parse an address.

        Raises:
            ValueError: if the string is not an address.
        """
        match = re.fullmatch(r"(?:([^.\d][^.]*)\.)?(\d+)\.(.+)", text)
        if match is None:
            raise ValueError(f"slot {text!r}: expected LAYER.SITE or STACK.LAYER.SITE, such as 4.feedforward")
        return cls(match[1] or "", int(match[2]), match[3])

    def __str__(self) -> str:
        return f"{f'{self.stack}.' if self.stack else ''}{self.layer}.{self.site}"

    @property
    def path(self) -> str:
        """Path of the slot module in the model. Dots of a site become underscores, as torch requires."""
        return str(SlotAddress(self.stack, self.layer, self.site.replace(".", "_")))


@dataclass
class CurrentBatch:
    """Inputs of all slots for the current batch, set before the backbone runs.

    This shared object is required since the backbone's modules do not pass additional arguments to a slot. It does not
    change until the next batch, so that layers recomputed in the backward pass read the same values.

    Attributes:
        features: (B, T, D), the cached input of the lowest layer with a slot, if any.
        capture: whether to stop the forward pass at that layer by raising `BoundaryReached` with its input.
    """

    context: BatchContext | None = None
    features: Tensor | None = None
    capture: bool = False


class Slot:
    """Base class of slots: an address, a slot module and the current batch.

    Subclasses implement a type of site and hook themselves into a layer. Slots of a layer are attached in the order of
    `order`: a sublayer's output includes the updates at its linear layers, and the input that a sublayer's slot reads
    excludes the update of `BeforeAttention`.

    Args:
        module: computes the update; registered as a submodule of the model, not of the slot.
        reads: input of the module, one of the site's `reads`.
        current: provides the context of each batch.

    Raises:
        ValueError: if the site does not support `reads`.
    """

    order: ClassVar[int] = 1

    def __init__(self, address: SlotAddress, site: Any, module: SlotModule, reads: str, current: CurrentBatch) -> None:
        if reads not in site.reads:
            raise ValueError(f"slot {address}: reads {reads!r}, expected one of {', '.join(site.reads)}")
        self.address = address
        self.name = str(address)
        self.site = site
        self.reads = reads
        self.module = module
        self._current = current
        self._kept: Tensor | None = None  # only set between two hooks of a forward pass

    def attach(self, layer: nn.Module) -> None:
        """Register the slot's hooks on a layer."""
        raise NotImplementedError

    @property
    def inactive(self) -> bool:
        """Whether the slot is inactive in the current batch."""
        # `layers_on` is a tuple, since compiled code would be specialized to each value of an integer.
        on = self._context.layers_on
        return bool(on) and not on[self.address.layer]

    @property
    def _context(self) -> BatchContext:
        context = self._current.context
        if context is None:
            raise RuntimeError(f"slot {self.name} was called outside of AdaptedModel.forward: no batch is set")
        return context

    def update(self, x: Tensor) -> Tensor:
        """Compute the update: x (B, T, D_in) -> (B, T, D_out)."""
        context = self._context
        named = context if context.record is None else replace(context, slot=self.name)
        update: Tensor = self.module(x, named)
        return update

    def _take(self) -> Tensor:
        kept, self._kept = self._kept, None
        assert kept is not None, f"slot {self.name}: the hooks ran in an unexpected order"
        return kept


class PostNormSlot(Slot):
    """Slot at a `PostNorm` site. The update is added to h + r, the input of the norm."""

    site: PostNorm

    def attach(self, layer: nn.Module) -> None:
        if self.reads == "output":
            layer.get_submodule(self.site.output).register_forward_hook(self._keep_output)
        elif self.reads == "input":
            reader = layer.get_submodule(self.site.reader)
            reader.register_forward_pre_hook(self._keep_input, with_kwargs=True)
        layer.get_submodule(self.site.norm).register_forward_pre_hook(self._before_norm)

    def _keep_output(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._kept = _first(output)

    def _keep_input(self, module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        self._kept = hidden_states(inputs, keywords)

    def _before_norm(self, norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (stream,) = inputs
        x = self._take() if self.reads in ("output", "input") else stream
        if self.inactive:
            return inputs
        if self.reads == "normed":
            x = norm.forward(stream)  # norm(stream) would run this hook again
        return (stream + self.update(x),)


class PreNormSlot(Slot):
    """Slot at a `PreNorm` site. The update is added to h, for pre-norm, sandwich-norm and parallel blocks."""

    site: PreNorm

    def attach(self, layer: nn.Module) -> None:
        if self.reads != "output":
            layer.get_submodule(self.site.norm).register_forward_hook(self._keep)
        layer.get_submodule(self.site.output).register_forward_hook(self._after_output)

    def _keep(self, norm: nn.Module, inputs: tuple[Tensor], normed: Tensor) -> None:
        self._kept = inputs[0] if self.reads == "stream" else normed

    def _after_output(self, module: nn.Module, inputs: Any, h: Tensor) -> Tensor:
        x = h if self.reads == "output" else self._take()
        if self.inactive:
            return h
        return h + self.update(x + h if self.reads == "stream" else x)


class BeforeAttentionSlot(Slot):
    """Slot at a `BeforeAttention` site."""

    order = 2
    site: BeforeAttention

    def attach(self, layer: nn.Module) -> None:
        first, *others = (layer.get_submodule(path) for path in self.site.readers)
        first.register_forward_pre_hook(self._before_first, with_kwargs=True)
        for other in others:
            other.register_forward_pre_hook(self._before_other, with_kwargs=True)

    def _before_first(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        self._kept = None
        if self.inactive:
            return inputs, keywords
        x = hidden_states(inputs, keywords)
        changed = x + self.update(x)
        if len(self.site.readers) > 1:
            self._kept = changed
        return with_hidden_states(inputs, keywords, changed)

    def _before_other(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        return (inputs, keywords) if self._kept is None else with_hidden_states(inputs, keywords, self._kept)


class LinearSlot(Slot):
    """Slot at a `LinearLayer` site."""

    order = 0
    site: LinearLayer

    def attach(self, layer: nn.Module) -> None:
        layer.get_submodule(self.site.linear).register_forward_hook(self._after)

    def _after(self, linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output if self.inactive else output + self.update(inputs[0])


_SLOTS: Mapping[type, type[Slot]] = {
    PostNorm: PostNormSlot,
    PreNorm: PreNormSlot,
    BeforeAttention: BeforeAttentionSlot,
    LinearLayer: LinearSlot,
}


def make_slot(address: SlotAddress, site: Site, module: SlotModule, reads: str, current: CurrentBatch) -> Slot:
    """Return a slot for a site; call `attach` to hook it into a layer."""
    return _SLOTS[type(site)](address, site, module, reads, current)


def hidden_states(inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """Return the hidden states that a transformers module was called with: its first or its keyword argument."""
    found: Tensor = inputs[0] if inputs else keywords["hidden_states"]
    return found


def with_hidden_states(
    inputs: tuple[Any, ...], keywords: dict[str, Any], states: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with `states` as hidden states."""
    if inputs:
        return (states, *inputs[1:]), keywords
    return inputs, {**keywords, "hidden_states": states}


def _first(output: Any) -> Tensor:
    """Return the output without the attention weights that attention modules also return."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found

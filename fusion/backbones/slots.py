"""Slots: positions in the backbone at which a slot module adds an update, by block layout (pre-norm, post-norm, ...).

Slots are attached with hooks, so the backbone's modules and tensor names do not change. r is the residual stream before
a sublayer, h the sublayer's output before it is added to r, LN a norm of the backbone. `reads` selects the input of a
slot module:

    output   h                        (Houlsby et al. 2019)
    normed   LN(h + r)                (Pfeiffer et al. 2021)
    stream   h + r
    input    input of the sublayer    (He et al. 2022, parallel; LoRA)

LN is the norm after the sublayer if there is one, else the norm before it. Without a norm, the values that an adapter
reads would grow with depth: in Gemma 3, they are in the hundreds.

Shapes: B texts, T tokens, D hidden size, D_in and D_out input and output sizes of a linear layer (else D).
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:  # the first checks of a command read the table of families without importing torch
    from torch import Tensor, nn

    from fusion.layers.gates import Gate
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
        """Parse an address. Raises ValueError if the string is not an address."""
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
        in_float32: whether slot modules compute in float32 even if the hidden states are in a half-precision dtype.
    """

    context: BatchContext = field(init=False, repr=False)
    features: Tensor | None = None
    capture: bool = False
    in_float32: bool = False

    def call(self, module: nn.Module, x: Tensor, context: BatchContext) -> Tensor:
        """Call a module of `fusion.layers` with x (B, T, D_in).

        If x has a half-precision dtype, products with float32 parameters are computed in that dtype, or in float32 on
        hardware without instructions for it.
        """
        import torch

        multiply_in_half = x.element_size() == 2
        if multiply_in_half and self.in_float32:
            x, multiply_in_half = x.float(), False
        with torch.autocast(x.device.type, x.dtype) if multiply_in_half else contextlib.nullcontext():
            output: Tensor = module(x, context)
        return output

    def watch_gate(self, layer: nn.Module, gate: Gate) -> None:
        """Compute the weights of a gate from the layer's input before the layer runs, in each batch."""

        def before(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.context.gates[gate.key] = self.call(gate, hidden_states(inputs, keywords), self.context)

        layer.register_forward_pre_hook(before, with_kwargs=True)


@dataclass(eq=False)
class Slot:
    """Base class of slots, one subclass per block layout; its fields are dotted module paths inside a layer.

    The sites in the table of families are slots without a module; `at` returns a copy with one. Slots of a layer are
    attached in the order of `order`: a sublayer's output includes the updates at its linear layers, and the input that
    a sublayer's slot reads excludes the update of `BeforeAttention`. `reads` lists the supported inputs of the module.
    """

    order: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("input",)
    address: SlotAddress = field(init=False, repr=False)
    module: SlotModule = field(init=False, repr=False)
    read: str = field(init=False, repr=False)
    _current: CurrentBatch = field(init=False, repr=False)
    _kept: Tensor | None = field(init=False, repr=False, default=None)  # only set between two hooks of a forward pass

    def at(self, address: SlotAddress, module: SlotModule, reads: str, current: CurrentBatch) -> Slot:
        """Return the slot at an address; call `attach` to hook it into the layer.

        Raises ValueError if the slot does not support `reads`.

        Args:
            module: computes the update; registered as a submodule of the model, not of the slot.
            reads: input of the module.
            current: provides the context of each batch.
        """
        if reads not in self.reads:
            raise ValueError(f"slot {address}: reads {reads!r}, expected one of {', '.join(self.reads)}")
        slot = copy.copy(self)
        slot.address, slot.module, slot.read, slot._current = address, module, reads, current
        return slot

    def attach(self, layer: nn.Module) -> None:
        """Register the slot's hooks on a layer."""
        raise NotImplementedError

    def fold(self) -> bool:
        """Replace the slot by a change of the backbone's weights, for inference; `False` if that is not possible."""
        return False

    @property
    def inactive(self) -> bool:
        """Whether the slot is inactive in the current batch."""
        # `layers_on` is a tuple, since compiled code would be specialized to each value of an integer.
        on = self._current.context.layers_on
        return bool(on) and not on[self.address.layer]

    def update(self, x: Tensor) -> Tensor:
        """Compute the update: x (B, T, D_in) -> (B, T, D_out)."""
        context = self._current.context
        named = context if context.record is None else replace(context, slot=str(self.address))
        return self._current.call(self.module, x, named).to(x.dtype)

    def _take(self) -> Tensor:
        kept, self._kept = self._kept, None
        assert kept is not None, "the hooks ran in an unexpected order"
        return kept


@dataclass(eq=False)
class PostNorm(Slot):
    """y = LN(h + r), as in BERT; with an update u, y = LN(h + u + r).

    Attributes:
        norm: LN, called with h + r.
        output: last module whose output is h, before functional dropout if the backbone uses it (BART).
        reader: module whose first argument is the sublayer's input.
    """

    reads = ("output", "normed", "stream", "input")
    norm: str
    output: str
    reader: str

    def attach(self, layer: nn.Module) -> None:
        if self.read == "output":
            layer.get_submodule(self.output).register_forward_hook(self._keep_output)
        elif self.read == "input":
            layer.get_submodule(self.reader).register_forward_pre_hook(self._keep_input, with_kwargs=True)
        layer.get_submodule(self.norm).register_forward_pre_hook(self._before_norm)

    def _keep_output(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._kept = output[0] if isinstance(output, tuple) else output  # attention also returns its weights

    def _keep_input(self, module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        self._kept = hidden_states(inputs, keywords)

    def _before_norm(self, norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (stream,) = inputs
        x = self._take() if self.read in ("output", "input") else stream
        if self.inactive:
            return inputs
        if self.read == "normed":
            x = norm.forward(stream)  # norm(stream) would run this hook again
        return (stream + self.update(x),)


@dataclass(eq=False)
class PreNorm(Slot):
    """y = r + h with h = f(LN(r)), as in GPT-2 and Llama; with an update u, h + u replaces h.

    The same attributes describe two more block layouts:

        sandwich norm (Gemma 2 and 3)    y = r + LN'(h + u)
        parallel block (GPT-J, Phi)      y = r + (h_attention + u_attention) + (h_feedforward + u_feedforward)

    Attributes:
        norm: LN, whose argument is r and whose output is the sublayer's input.
        output: last module whose output is h, before functional dropout if the backbone uses it (mBART).
    """

    reads = ("output", "normed", "stream", "input")
    norm: str
    output: str
    _norm: nn.Module = field(init=False, repr=False)

    def attach(self, layer: nn.Module) -> None:
        self._norm = layer.get_submodule(self.norm)
        if self.read != "output":
            layer.get_submodule(self.norm).register_forward_hook(self._keep)
        layer.get_submodule(self.output).register_forward_hook(self._after_output)

    def _keep(self, norm: nn.Module, inputs: tuple[Tensor], normed: Tensor) -> None:
        self._kept = normed if self.read == "input" else inputs[0]

    def _after_output(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        h, others = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        x = h if self.read == "output" else self._take()
        if self.inactive:
            return output
        if self.read in ("normed", "stream"):
            x = x + h
        if self.read == "normed":
            x = self._norm.forward(x)  # self._norm(x) would run the hook that keeps its input
        h = h + self.update(x)
        return h if others is None else (h, *others)


@dataclass(eq=False)
class BeforeAttention(Slot):
    """Input of self-attention: it reads i + u instead of i; the residual stream is unchanged.

    Attributes:
        readers: modules whose first argument is i, in execution order.
    """

    order = 2
    readers: tuple[str, ...]

    def attach(self, layer: nn.Module) -> None:
        first, *others = (layer.get_submodule(path) for path in self.readers)
        first.register_forward_pre_hook(self._before_first, with_kwargs=True)
        for other in others:
            other.register_forward_pre_hook(self._before_other, with_kwargs=True)

    def _before_first(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        self._kept = None
        if self.inactive:
            return inputs, keywords
        x = hidden_states(inputs, keywords)
        changed = x + self.update(x)
        if len(self.readers) > 1:
            self._kept = changed
        return with_hidden_states(inputs, keywords, changed)

    def _before_other(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        return (inputs, keywords) if self._kept is None else with_hidden_states(inputs, keywords, self._kept)


@dataclass(eq=False)
class LinearLayer(Slot):
    """y = W x + b + u(x): an update with the input and output sizes of a linear layer (LoRA, Hu et al. 2022).

    Attributes:
        linear: a `torch.nn.Linear`, or transformers' `Conv1D`.
    """

    order = 0
    linear: str
    _linear: Any = field(init=False, repr=False)
    _hook: Any = field(init=False, repr=False)

    def attach(self, layer: nn.Module) -> None:
        self._linear = layer.get_submodule(self.linear)
        self._hook = self._linear.register_forward_hook(self._after)

    def fold(self) -> bool:
        """Add the update to the weight and the bias, if it is a linear map."""
        from torch import nn

        update = self.module.linear_map()
        if update is None:
            return False
        linear, weight = self._linear, self._linear.weight
        # New parameters, since other models may share the old ones. transformers' Conv1D stores the transposed matrix.
        added = weight.double() + (update.weight if isinstance(linear, nn.Linear) else update.weight.T)
        linear.weight = nn.Parameter(added.to(weight.dtype), requires_grad=False)
        if linear.bias is not None or update.bias.any():
            bias = update.bias if linear.bias is None else linear.bias.double() + update.bias
            linear.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
        self._hook.remove()
        return True

    def _after(self, linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output if self.inactive else output + self.update(inputs[0])


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

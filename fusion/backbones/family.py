"""A model family: module paths and the block layout of each site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from fusion.backbones.slots import LinearLayer, Slot, SlotAddress

if TYPE_CHECKING:  # the first checks of a command read the table of families without importing torch
    from torch import nn


@dataclass(frozen=True)
class Stack:
    """One stack of layers.

    Attributes:
        layers: dotted path of the list of layers inside the model.
        sites: sites at which a layer can have slots, by name.
        outputs: length of the tuple that a layer returns, hidden states first. If `None`, it returns a tensor.
        position_bias: module of the first layer that computes the position bias of all layers (T5), which layers
            return after the hidden states, or `None`.
        pooling: default of `backbone.pooling`. If it is not `cls`, the first token has no representation of the text.
    """

    layers: str
    sites: Mapping[str, Slot]
    outputs: int | None = None
    position_bias: str | None = None
    pooling: str = "cls"


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: `model_type` of the config.
        stacks: stacks by name, from the one that reads the input to the one whose output is the model's; a single stack
            has the empty name.
        model_options: additional arguments of the model's constructor.
        has_cache: whether the config has `use_cache`; the key-value cache is only used in generation.
        positions_follow_padding: whether position ids count non-padding tokens, from `pad_token_id` + 1, instead of all
            tokens from 0.
        repeated: whether the model uses each module of `layers` for multiple layers (ALBERT).
        architecture: config keys that determine the model's output. The backbone's fingerprint is computed from them
            and the tensors; keys that later library versions add are ignored.
        optional: modules of the backbone that some models of the family do not have.
        shift_right: whether the decoder's input, the encoder's input shifted by one token, is an argument (T5).
    """

    name: str
    stacks: Mapping[str, Stack]
    model_options: Mapping[str, Any] = field(default_factory=dict)
    positions_follow_padding: bool = False
    repeated: bool = False
    architecture: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    shift_right: bool = False
    has_cache: bool = False

    @property
    def first_stack(self) -> Stack:
        """Stack that reads the input."""
        return next(iter(self.stacks.values()))

    @property
    def pooling(self) -> str:
        """Default of `backbone.pooling`."""
        return list(self.stacks.values())[-1].pooling

    @property
    def causal(self) -> bool:
        """Whether the hidden state of a token depends only on the tokens before it."""
        return self.pooling == "last"

    def linear_names(self, targets: Iterable[str]) -> list[str]:
        """Return the last parts of the names of linear layers, given these or the last parts of sites.

        With one linear layer for query, key and value (GPT-2), its name replaces each of them. Unknown names are kept.
        """
        names: dict[str, list[str]] = {}
        for stack in self.stacks.values():
            for site, slot in stack.sites.items():
                if isinstance(slot, LinearLayer):
                    names.setdefault(site.rpartition(".")[2], []).append(slot.linear.rpartition(".")[2])
        own = {name for found in names.values() for name in found}
        for part in ("query", "key", "value"):
            names.setdefault(part, names.get("query_key_value", []))
        found = [name for target in targets for name in ([target] if target in own else names.get(target) or [target])]
        return list(dict.fromkeys(found))

    def linear_slots(self, depths: Mapping[str, int]) -> dict[str, str]:
        """Return the slots at linear layers by dotted path in the model, given the number of layers by stack."""
        return {
            f"{stack.layers}.{layer}.{slot.linear}": str(SlotAddress(name, layer, site))
            for name, stack in self.stacks.items()
            for layer in range(depths.get(name, 0))
            for site, slot in stack.sites.items()
            if isinstance(slot, LinearLayer)
        }

    def encoder_only(self) -> Family:
        """Return the family without the decoder."""
        return replace(self, stacks={"encoder": self.stacks["encoder"]})

    def layer_list(self, model: nn.Module, stack: str | None = None) -> nn.ModuleList:
        """Return the layers of a stack (default: the first stack)."""
        path = (self.first_stack if stack is None else self.stacks[stack]).layers
        return cast("nn.ModuleList", model.get_submodule(path))

"""What describes one architecture: the module paths of its layers and sublayers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from fusion.backbones.wirings import Wiring

if TYPE_CHECKING:  # a command's first checks read the table of families without torch
    from torch import nn


@dataclass(frozen=True)
class Stack:
    """One stack of layers.

    Attributes:
        layers: dotted path of the list of layers inside the model.
        sites: where slots can be in a layer, by name.
        outputs: the length of the tuple that a layer returns, hidden states first; None: it returns them alone.
        position_bias: the module of the first layer that computes the position bias of all layers (T5), which layers
            return after the hidden states; None if absent.
    """

    layers: str
    sites: Mapping[str, Wiring]
    outputs: int | None = None
    position_bias: str | None = None


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: its `model_type`.
        stem: dotted paths of the modules before the first layer and after the last one; missing ones are ignored.
        stacks: by name, first the one that reads the input; a single stack has the empty name.
        architecture: the config keys that determine what the model computes; together with the tensors they are the
            backbone's fingerprint, so keys that a later version of a library may add are ignored.
        model_options: arguments of the model's constructor beside the config.
        positions_follow_padding: whether positions count the tokens that are not padding, from `pad_token_id` + 1;
            otherwise they count all tokens from 0, padding included.
        repeated: whether the model uses each module of `layers` for multiple layers (ALBERT).
        commands: whether the commands train it.
    """

    name: str
    stem: tuple[str, ...]
    stacks: Mapping[str, Stack]
    architecture: tuple[str, ...]
    model_options: Mapping[str, Any] = field(default_factory=dict)
    positions_follow_padding: bool = False
    repeated: bool = False
    commands: bool = False

    @property
    def first_stack(self) -> Stack:
        """The stack that reads the input."""
        return next(iter(self.stacks.values()))

    @property
    def layers(self) -> str:
        """The dotted path of the layers of the first stack."""
        return self.first_stack.layers

    @property
    def sites(self) -> Mapping[str, Wiring]:
        """The sites of the first stack."""
        return self.first_stack.sites

    def layer_list(self, model: nn.Module, stack: str | None = None) -> nn.ModuleList:
        """The layers of a stack; None: of the first one."""
        path = self.layers if stack is None else self.stacks[stack].layers
        return cast("nn.ModuleList", model.get_submodule(path))

    @property
    def roots(self) -> set[str]:
        """The first parts of the names of all tensors that a forward pass uses."""
        paths = (*self.stem, *(stack.layers for stack in self.stacks.values()))
        return {path.partition(".")[0] for path in paths}

    def positions(self, table: int, pad_token_id: int | None) -> int:
        """The longest sequence, given the number of rows of the position table."""
        return table - (pad_token_id or 0) - 1 if self.positions_follow_padding else table

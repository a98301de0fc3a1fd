"""The boundary between what is frozen and what trains: the input of the lowest layer that has a slot.

With the backbone's dropout off, the hidden states there are a fixed function of the row, so they need not be computed
more than once: see `fusion.model.feature_cache`. They have one shape in all families, (B, T, D).

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from fusion.backbones.family import Stack
from fusion.backbones.slots import CurrentBatch, hidden_states, with_hidden_states


class BoundaryReached(Exception):
    """Not an error: the pass got to the boundary, and that was all that was asked for.

    Args:
        features: (B, T, D), the input of the lowest layer that has a slot.
    """

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def watch_boundary(layer: nn.Module, current: CurrentBatch) -> None:
    """Let the lowest layer that has a slot end a pass that captures, and start from the batch's features if it has any."""

    def before(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if current.capture:
            raise BoundaryReached(hidden_states(inputs, keywords))
        if current.features is None:
            return inputs, keywords
        return with_hidden_states(inputs, keywords, current.features)

    layer.register_forward_pre_hook(before, with_kwargs=True)


def skip_with_features(layers: nn.ModuleList, count: int, stack: Stack, current: CurrentBatch) -> None:
    """Do not compute the first `count` layers where a batch has its features: nothing reads their hidden states.

    The modules stay as they are, and so do the names of their tensors.
    """
    for layer in list(layers)[:count]:
        layer.forward = partial(_unless_known, layer, layer.forward, stack, current)


def _unless_known(
    layer: nn.Module,
    forward: Callable[..., Any],
    stack: Stack,
    current: CurrentBatch,
    *inputs: Any,
    **keywords: Any,
) -> Any:
    if current.features is None:
        return forward(*inputs, **keywords)
    states = hidden_states(inputs, keywords)
    if stack.outputs is None:
        return states
    others: list[Any] = [None] * (stack.outputs - 1)
    if stack.position_bias is not None:
        others[0] = _position_bias(layer.get_submodule(stack.position_bias), states, inputs, keywords)
    return states, *others


def _position_bias(
    attention: Any, states: Tensor, inputs: tuple[Any, ...], keywords: Mapping[str, Any]
) -> Tensor:
    """What a block of T5 passes on to the next: the first computes it, (1, heads, T, T), for all."""
    bias: Tensor | None = inputs[2] if len(inputs) > 2 else keywords.get("position_bias")
    if bias is None:
        bias = attention.compute_bias(states.shape[1], states.shape[1], device=states.device)
    return bias

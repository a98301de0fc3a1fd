"""The boundary between frozen and trained layers: the input of the lowest layer with a slot.

Without dropout, the hidden states there are a fixed function of the row and can be computed once, see
`fusion.model.feature_cache`. Their shape is (B, T, D) in all families.

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
    """Ends a forward pass at the boundary; not an error.

    Args:
        features: (B, T, D), the input of the lowest layer with a slot.
    """

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def watch_boundary(layer: nn.Module, current: CurrentBatch) -> None:
    """Hook the lowest layer with a slot: it ends a capturing pass, and reads the batch's features if there are any."""

    def before(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if current.capture:
            raise BoundaryReached(hidden_states(inputs, keywords))
        if current.features is None:
            return inputs, keywords
        return with_hidden_states(inputs, keywords, current.features)

    layer.register_forward_pre_hook(before, with_kwargs=True)


def skip_with_features(layers: nn.ModuleList, count: int, stack: Stack, current: CurrentBatch) -> None:
    """Skip the first `count` layers if a batch has features. Modules and tensor names do not change."""
    for layer in list(layers)[:count]:
        layer.forward = partial(_unless_known, layer, layer.forward, stack, current)


def _unless_known(
    layer: nn.Module, forward: Callable[..., Any], stack: Stack, current: CurrentBatch, *inputs: Any, **keywords: Any
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


def _position_bias(attention: Any, states: Tensor, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """The position bias (1, heads, T, T), which T5's first block computes for all."""
    bias: Tensor | None = inputs[2] if len(inputs) > 2 else keywords.get("position_bias")
    if bias is None:
        bias = attention.compute_bias(states.shape[1], states.shape[1], device=states.device)
    return bias

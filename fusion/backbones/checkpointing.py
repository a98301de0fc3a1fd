"""Gradient checkpointing: keep only each layer's input, and recompute the layer in the backward pass.

transformers' own switch requires layers in training mode; here they are in evaluation mode, since dropout is off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusion.backbones.slots import CurrentBatch
from fusion.layers.slot_module import BatchContext


def recompute_in_backward(layers: nn.ModuleList, current: CurrentBatch) -> None:
    """Recompute every layer in the backward pass, with the same random numbers and the same batch.

    Modules and tensor names do not change. Without gradients there is no effect.
    """
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward, current)


def _checkpointed(forward: Callable[..., Any], current: CurrentBatch, *inputs: Any, **keywords: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **keywords)
    context, features = current.context, current.features
    return checkpoint(
        forward,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _once_more(current, context, features)),
        **keywords,
    )


@contextlib.contextmanager
def _once_more(current: CurrentBatch, context: BatchContext | None, features: Tensor | None) -> Iterator[None]:
    """Restore the batch of the forward pass for the recomputation, without recording weights twice."""
    now = current.context, current.features
    # Not None: the recomputation must run the same operations.
    recorded = context is not None and context.record is not None
    current.context = replace(context, record=_ignore) if context is not None and recorded else context
    current.features = features
    try:
        yield
    finally:
        current.context, current.features = now


def _ignore(place: str, weights: Tensor) -> None:
    pass

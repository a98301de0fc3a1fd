"""Gradient checkpointing: keep each layer's input only, and compute the layer again for its gradient.

A backbone's own switch for it acts where a layer is in training mode, and ours is in evaluation mode
while its dropout is off. So the layers are wrapped here, for all families alike.
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
    """Let every layer be computed once more in backward, with the same random numbers and the same batch.

    The modules stay as they are, and so do the names of their tensors. Without gradients nothing changes.
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
def _once_more(
    current: CurrentBatch, context: BatchContext | None, features: Tensor | None
) -> Iterator[None]:
    """The slots see the batch of the first time, and whoever records has heard it all already."""
    now = current.context, current.features
    # A recorder that hears nothing and not None: what is computed must be the same, operation by operation.
    recorded = context is not None and context.record is not None
    current.context = replace(context, record=_ignore) if context is not None and recorded else context
    current.features = features
    try:
        yield
    finally:
        current.context, current.features = now


def _ignore(place: str, weights: Tensor) -> None:
    pass

"""Changes to how a backbone calls its layers: skipped with cached features, recomputed in backward, or compiled.

The boundary between frozen and trained layers is the input of the lowest layer with a slot. Without dropout, the hidden
states at the boundary depend only on the example and can be computed once, see `fusion.model.feature_cache`.

Shapes: B texts, T tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusion.backbones.family import Stack
from fusion.backbones.slots import CurrentBatch, hidden_states, with_hidden_states
from fusion.errors import UserError
from fusion.layers.slot_module import BatchContext


class BoundaryReached(Exception):
    """Raised to stop a forward pass at the boundary; its argument is the input (B, T, D) of that layer."""


def watch_boundary(layer: nn.Module, current: CurrentBatch) -> None:
    """Hook the lowest layer with a slot, so that it stops capturing passes and reads cached features."""

    def before(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if current.capture:
            raise BoundaryReached(hidden_states(inputs, keywords))
        if current.features is None:
            return inputs, keywords
        states = hidden_states(inputs, keywords)
        return with_hidden_states(inputs, keywords, current.features.to(states.dtype))

    layer.register_forward_pre_hook(before, with_kwargs=True)


def skip_with_features(layers: nn.ModuleList, count: int, stack: Stack, current: CurrentBatch) -> None:
    """Skip the first `count` layers for batches with cached features."""
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
    """Return the position bias (1, heads, T, T), which T5's first block computes for all blocks."""
    bias: Tensor | None = inputs[2] if len(inputs) > 2 else keywords.get("position_bias")
    if bias is None:
        bias = attention.compute_bias(states.shape[1], states.shape[1], device=states.device)
    return bias


def recompute_in_backward(layers: Iterable[nn.Module], current: CurrentBatch) -> None:
    """Enable gradient checkpointing: save only each layer's input, and recompute the layer in the backward pass.

    RNG state and batch are restored for the recomputation. transformers' own gradient checkpointing requires layers in
    training mode, but here they are in evaluation mode, since dropout is off.
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
        context_fn=lambda: (contextlib.nullcontext(), _restored(current, context, features)),
        **keywords,
    )


@contextlib.contextmanager
def _restored(current: CurrentBatch, context: BatchContext, features: Tensor | None) -> Iterator[None]:
    """Restore the batch of the forward pass for the recomputation, without recording weights twice."""
    now = current.context, current.features
    if context.record is not None:  # not replaced by None: the recomputation must run the same operations
        context = replace(context, record=lambda slot, weights: None)
    current.context, current.features = context, features
    try:
        yield
    finally:
        current.context, current.features = now


def check_compiler() -> None:
    """Raise UserError if a requirement of torch.compile is missing: a C++ compiler, Python's headers, a usable path."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    unquoted = [str(path) for path in (Path(torch.__file__).parent, header.parent) if " " in str(path)]  # by Inductor
    if shutil.which(compiler) is None:
        problem = f" requires a C++ compiler, but {compiler} was not found: install it, set CXX to a different compiler"
    elif not header.is_file():
        problem = f" requires Python's headers, but {header} was not found: install them (python3-dev)"
    elif unquoted:
        problem = (
            f": torch.compile cannot use the path {unquoted[0]}, which contains a space: create the environment in a path "
            "without spaces"
        )
    else:
        return
    raise UserError(f"compile=true{problem}, or set compile=false")


def compile_layers(layers: nn.ModuleList | list[nn.Module], backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each layer on its next call, much faster than the model, with dynamic batch size and sequence length."""
    # Code compiled for an earlier model of this process counts against the cache limit.
    torch.compiler.reset()
    # Layers may have different sources, and each layer is compiled for training, evaluation and batches of one text.
    torch._dynamo.config.cache_size_limit = max(8, 4 * len(layers))
    # A layer with hooks must not use code compiled for a layer without hooks.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)

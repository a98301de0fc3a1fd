"""Attention of a backbone in a half-precision type on a CPU: fused in the forward pass, matrix products in backward.

torch's fused attention computes its gradients on a CPU without the matrix units for half-precision types, which takes
about half of a training step. Here the backward pass recomputes the probabilities P with matrix products:

    O  = P V,  P = softmax(S),  S = scaling · Q Kᵀ + mask
    dV = Pᵀ dO,  dS = P ⊙ (dO Vᵀ − rowsum(dO ⊙ O)),  dQ = scaling · dS K,  dK = scaling · dSᵀ Q

Shapes: B texts, H heads, T tokens, E size of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_with_plain_backward"


class FusedForward(torch.autograd.Function):
    """Scaled dot-product attention: query, key, value (B, H, T, E) -> (B, H, T, E).

    `mask` is broadcast to (B, H, T, T): True or 0 where a token attends. The softmax is computed in float32, and so are
    the products of the backward pass with `in_float32`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        in_float32: bool = False,
    ) -> Tensor:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        ctx.save_for_backward(query, key, value, mask, output)
        ctx.scaling, ctx.in_float32 = scaling, in_float32
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, output = ctx.saved_tensors
        given, exact = query.dtype, torch.promote_types(query.dtype, torch.float32)
        if ctx.in_float32:
            query, key, value, gradient = query.float(), key.float(), value.float(), gradient.float()
        scores = (query @ key.transpose(-1, -2)).to(exact) * ctx.scaling
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        p = scores.softmax(-1)
        inner = (gradient.to(exact) * output).sum(-1, keepdim=True)
        d_scores = (p * ((gradient @ value.transpose(-1, -2)).to(exact) - inner) * ctx.scaling).to(query.dtype)
        d_value = p.to(query.dtype).transpose(-1, -2) @ gradient
        d_query, d_key = d_scores @ key, d_scores.transpose(-1, -2) @ query
        return d_query.to(given), d_key.to(given), d_value.to(given), None, None, None


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    in_float32: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers' `sdpa` does, with the backward pass of this module where it is faster."""
    half = query.dtype in (torch.bfloat16, torch.float16) and query.device.type == "cpu"
    trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = attention_mask is not None or not causal
    if dropout or not (half and trained and plain) or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: Tensor = FusedForward.apply(query, key, value, attention_mask, scaling, in_float32)
    return output.transpose(1, 2).contiguous(), None


def use_plain_backward(model: PreTrainedModel, in_float32: bool = False) -> None:
    """Let a model that uses `sdpa` call `attention` instead.

    Args:
        in_float32: whether products of the backward pass are computed in float32.
    """
    if model.config._attn_implementation != "sdpa":
        return
    name = f"{NAME}_in_float32" if in_float32 else NAME
    AttentionInterface.register(name, functools.partial(attention, in_float32=in_float32))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)

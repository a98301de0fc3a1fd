"""Products of matrices in a half-precision type, computed in float32 on a CPU without instructions for that type.

There, torch takes about eight times as long for a product in bfloat16 as in float32. A matrix unit multiplies in the
half-precision type and adds in float32, so the results are the same up to the order of the sums: operands and results
are rounded to the half-precision type, everything in between is in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


class FrozenProduct(torch.autograd.Function):
    """x W^T + b with W and b frozen: x (..., D_in), weight (D_out, D_in), bias (D_out,) -> (..., D_out).

    For the backward pass, only the half-precision weight is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return (gradient.float() @ weight.float()).to(gradient.dtype), None, None


class Linear(nn.Linear):
    """A frozen `torch.nn.Linear` that multiplies in float32."""

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = FrozenProduct.apply(x, self.weight, self.bias)
        return product


class TransposedLinear(Conv1D):
    """A frozen `Conv1D` of transformers, whose weight is (D_in, D_out), that multiplies in float32."""

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = FrozenProduct.apply(x, self.weight.T, self.bias)
        return product


def multiply_in_float32(model: nn.Module) -> None:
    """Let the linear layers of a frozen model multiply in float32. Names and values of the weights do not change."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif type(module) is Conv1D:
            module.__class__ = TransposedLinear

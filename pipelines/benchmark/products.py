"""Record the matrix products of a step and run them without anything else, as a lower bound of its time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
FIRST = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}


class Products(TorchDispatchMode):
    """Records tensors like those of each matrix product, shared by equal layouts. Attention must not be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self._made: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FIRST:
            left, right = args[FIRST[func] : FIRST[func] + 2]
            self.calls.append((self._like(left), self._like(right), torch.empty_like(result)))
        return result

    def _like(self, operand: Tensor) -> Tensor:
        layout = (operand.shape, operand.stride(), operand.dtype)
        if layout not in self._made:
            self._made[layout] = torch.empty_strided(*layout[:2], dtype=operand.dtype, device=operand.device).normal_()
        return self._made[layout]

    @torch.inference_mode()
    def run(self) -> None:
        for left, right, out in self.calls:
            torch.matmul(left, right, out=out)

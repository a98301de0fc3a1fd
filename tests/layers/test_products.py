"""Products in the cheapest order against torch's own count of operations."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fusion.layers import products
from fusion.layers.products import cheapest, multiply_adds, ordered_product

CUTS = {2: [(0, 2), (0, 1, 2)], 3: [(0, 3), (0, 1, 3), (0, 2, 3), (0, 1, 2, 3)]}


def tensors(
    rows: int, sizes: tuple[int, ...], trained: tuple[bool, ...], gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(rows, sizes[0], dtype=torch.float64, requires_grad=gradient)
    shapes = zip(sizes, sizes[1:], trained, strict=False)
    return x, [torch.randn(a, b, dtype=torch.float64, requires_grad=one) for a, b, one in shapes]


def counted(x: Tensor, factors: list[Tensor]) -> int:
    """Multiply-adds of the forward and the backward pass, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        y = ordered_product(x, factors, torch.zeros(1, dtype=x.dtype).expand(factors[-1].shape[1]))
        if y.requires_grad:
            y.sum().backward()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("sizes", [(5, 7, 3), (5, 5, 5, 2), (4, 9, 3, 6)])
@pytest.mark.parametrize("gradient", [True, False])
def test_every_order_is_counted_as_torch_counts_it(
    sizes: tuple[int, ...], gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trained in product([True, False], repeat=len(sizes) - 1):
        for rows in (1, 6, 40):
            x, factors = tensors(rows, sizes, trained, gradient)
            bias = torch.randn(sizes[-1], dtype=x.dtype)
            plain = x
            for factor in factors:
                plain = plain @ factor
            counts = {}
            for cuts in CUTS[len(factors)]:
                monkeypatch.setattr(products, "cheapest", lambda *_, cuts=cuts: cuts)
                torch.testing.assert_close(ordered_product(x, factors, bias), plain + bias, rtol=1e-12, atol=1e-12)
                counts[cuts] = counted(x, factors)
                assert counts[cuts] == multiply_adds(rows, sizes, trained, cuts, gradient), (cuts, trained, rows)
            assert counts[cheapest(rows, sizes, trained, gradient)] == min(counts.values())
            monkeypatch.undo()
            assert counted(x, factors) == min(counts.values())


def test_without_gradients_only_the_forward_pass_counts() -> None:
    x, factors = tensors(4, (6, 6, 50), (True, True), True)
    with torch.no_grad():
        assert counted(x, factors) == multiply_adds(4, (6, 6, 50), (False, False), (0, 1, 2), False) == 4 * 6 * 56


@pytest.mark.parametrize("shape", [(), (6, 10), (6, 1)])  # of the bias: the same everywhere, per token, per text
def test_batches_and_gradients(shape: tuple[int, ...]) -> None:
    x, factors = tensors(60, (4, 9, 3, 6), (True, True, False), True)
    bias = torch.randn(*shape, 6, dtype=x.dtype, requires_grad=True)
    plain = torch.einsum("btd,de,ef,fg->btg", x.view(6, 10, 4), *factors) + bias
    wanted = [x, *factors[:2], bias]
    expected = torch.autograd.grad(plain.sin().sum(), wanted)
    y = ordered_product(x.view(6, 10, 4), factors, bias)
    torch.testing.assert_close(y, plain, rtol=0, atol=1e-10)
    for one, two in zip(torch.autograd.grad(y.sin().sum(), wanted), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)

"""Products of a batch with several matrices, in the order with the fewest multiply-adds.

A composition multiplies tokens by a chain of matrices, some of them trained: query, key and the adapters'
up-projections. Depending on the number of tokens and on the sizes, it is cheaper to multiply the tokens by one matrix
after the other, or to multiply some of the matrices first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import torch
from torch import Tensor

_COMPILED_ROWS = 2048  # rows for which compiled code chooses the order


def ordered_product(x: Tensor, factors: Sequence[Tensor], bias: Tensor) -> Tensor:
    """Compute x F_1 F_2 … F_n + bias, equal in every order up to rounding.

    x: (..., D_0), F_i: (D_{i-1}, D_i), bias: (D_n,) or any shape that expands to that of the result, (..., D_n).
    """
    trained = [torch.is_grad_enabled() and factor.requires_grad for factor in factors]
    sizes = [factors[0].shape[0], *(factor.shape[1] for factor in factors)]
    # A number of rows of which the order depends would be compiled again for each order.
    count = _COMPILED_ROWS if torch.compiler.is_compiling() else x.shape[:-1].numel()
    cuts = cheapest(count, sizes, trained, torch.is_grad_enabled() and x.requires_grad)
    rows = x.reshape(-1, sizes[0])
    if bias.dim() > 1:
        bias = bias.expand(*x.shape[:-1], -1).reshape(-1, sizes[-1])
    for start, end in pairwise(cuts):
        matrix = factors[start]
        for factor in factors[start + 1 : end]:
            matrix = matrix @ factor
        rows = rows @ matrix if end < len(factors) else torch.addmm(bias, rows, matrix)
    return rows.view(*x.shape[:-1], -1)


def cheapest(rows: int, sizes: Sequence[int], trained: Sequence[bool], input_gradient: bool = True) -> tuple[int, ...]:
    """Return the cuts 0 < … < n between groups of factors that are multiplied before the rows are.

    Args:
        rows: number of rows of x.
        sizes: D_0, …, D_n.
        trained: whether each factor requires a gradient.
        input_gradient: whether x requires a gradient.
    """
    costs = [(multiply_adds(rows, sizes, trained, cuts, input_gradient), cuts) for cuts in _cuts(len(trained))]
    best = costs[0]
    for cost in costs[1:]:  # torch.compile does not trace `min` of tuples
        if cost[0] < best[0]:
            best = cost
    return best[1]


def multiply_adds(
    rows: int, sizes: Sequence[int], trained: Sequence[bool], cuts: Sequence[int], input_gradient: bool = True
) -> int:
    """Return the multiply-adds of the forward and the backward pass: a product costs as much again per gradient."""
    total, gradient = 0, input_gradient
    for start, end in pairwise(cuts):
        group = False
        for factor in range(start, end):
            before, group = group, group or trained[factor]
            if factor > start:
                total += sizes[start] * sizes[factor] * sizes[factor + 1] * (1 + before + trained[factor])
        total += rows * sizes[start] * sizes[end] * (1 + gradient + group)
        gradient = gradient or group
    return total


def _cuts(count: int) -> Iterator[tuple[int, ...]]:
    for inner in range(count):
        for cuts in combinations(range(1, count), inner):
            yield (0, *cuts, count)

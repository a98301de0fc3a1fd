"""The matrix products that a training step cannot do without, and a program that does only them.

They are counted by hand from the equations, so that work which a model does needlessly is not part of
its own floor. What is frozen gets no gradient: below the lowest adapter nothing runs backward.

Shapes: B rows, T tokens, M = B·T, D hidden size, I width inside the feed-forward, H heads, L layers,
R bottleneck size, N sources, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    rows: int
    tokens: int
    hidden_size: int
    intermediate_size: int
    heads: int
    layers: int
    outputs: int


@dataclass(frozen=True)
class Product:
    """`count` products of (rows, inner) with (inner, columns); `batch` of them in one call, for attention.

    weight_gradient: rows and columns are widths and inner is M: the layout that a weight's gradient has.
    """

    rows: int
    inner: int
    columns: int
    count: int = 1
    batch: int = 1
    weight_gradient: bool = False

    @property
    def multiply_adds(self) -> int:
        return self.count * self.batch * self.rows * self.inner * self.columns


def training_step(sizes: Sizes, bottleneck: int, sources: int | None) -> list[Product]:
    """Forward and backward of one adapter (`sources` None) or of a fusion of N, after every feed-forward."""
    products = _forward_backbone(sizes)
    for layer in range(sizes.layers):
        lowest = layer == 0
        if not lowest:
            products += _backward_backbone(sizes)
        if sources is None:
            products += _adapter(sizes, bottleneck, lowest)
        else:
            products += _fusion(sizes, bottleneck, sources, lowest)
    return products + _head(sizes)


def inference(sizes: Sizes, bottleneck: int, sources: int | None) -> list[Product]:
    """Forward with merged weights: of a fusion, three products as wide as all bottlenecks together."""
    m, d = sizes.rows * sizes.tokens, sizes.hidden_size
    width = bottleneck * (1 if sources is None else sources)
    products = _forward_backbone(sizes)
    products += [Product(m, d, width, sizes.layers), Product(m, width, d, sizes.layers)]
    if sources is not None:
        products += [
            Product(m, d, width, sizes.layers),
            Product(m, d, sources, sizes.layers),
            Product(m, sources, d, sizes.layers),
        ]
    return [*products, Product(sizes.rows, d, sizes.outputs)]


def multiply_adds(products: list[Product]) -> int:
    return sum(product.multiply_adds for product in products)


def _forward_backbone(sizes: Sizes) -> list[Product]:
    m, d, i = sizes.rows * sizes.tokens, sizes.hidden_size, sizes.intermediate_size
    t, head = sizes.tokens, d // sizes.heads
    batch = sizes.rows * sizes.heads
    return [
        Product(m, d, d, 4 * sizes.layers),  # query, key, value, output
        Product(t, head, t, sizes.layers, batch),  # q·k
        Product(t, t, head, sizes.layers, batch),  # p·v
        Product(m, d, i, sizes.layers),
        Product(m, i, d, sizes.layers),
    ]


def _backward_backbone(sizes: Sizes) -> list[Product]:
    """Of one frozen layer: each product once for what went in, attention's two for both sides."""
    m, d, i = sizes.rows * sizes.tokens, sizes.hidden_size, sizes.intermediate_size
    t, head = sizes.tokens, d // sizes.heads
    batch = sizes.rows * sizes.heads
    return [
        Product(m, d, d, 4),
        Product(t, head, t, 1, batch),  # gradient of p
        Product(t, t, head, 3, batch),  # gradients of v, q and k
        Product(m, d, i, 1),
        Product(m, i, d, 1),
    ]


def _adapter(sizes: Sizes, bottleneck: int, lowest: bool) -> list[Product]:
    m, d, r = sizes.rows * sizes.tokens, sizes.hidden_size, bottleneck
    products = [
        Product(m, d, r),  # down
        Product(m, r, d),  # up
        Product(m, d, r),  # gradient of z
        Product(d, m, r, weight_gradient=True),
        Product(r, m, d, weight_gradient=True),
    ]
    return products if lowest else [*products, Product(m, r, d)]  # gradient of x


def _fusion(sizes: Sizes, bottleneck: int, sources: int, lowest: bool) -> list[Product]:
    m, d, n, width = sizes.rows * sizes.tokens, sizes.hidden_size, sources, sources * bottleneck
    shared = [  # whatever the order of query and key
        Product(m, d, width, 2),  # x to z, g to the bottlenecks
        Product(m, width, d),  # p ⊙ z to the mean
        Product(m, d, d),  # o
        Product(m, d, n),  # g·bu
        Product(m, n, d),  # Σ p bu
        Product(m, d, 1),  # q·bk
        # backward
        Product(d, m, d, weight_gradient=True),  # of Wv
        Product(m, d, d),  # of the mean
        Product(m, d, width),  # of p ⊙ z
        Product(m, width, d),  # of g
        Product(m, d, n),  # of p, through bu
        Product(m, n, d),  # of g, through bu
        Product(m, 1, d),  # of x or q, through bk
        Product(1, m, d, weight_gradient=True),  # of bk
    ]
    if m > d:  # Wk and Wq first
        scoring = [
            Product(d, d, d, 3),  # M = Wkᵀ Wq, and from its gradient those of both
            Product(m, d, d),  # g
            Product(d, m, d, weight_gradient=True),  # of M
        ]
    else:
        scoring = [
            Product(m, d, d, 2),  # q, g
            Product(d, m, d, 2, weight_gradient=True),  # of Wq, Wk
            Product(m, d, d),  # of q
        ]
    through_x = [Product(m, width, d), Product(m, d, d)]  # of x: from z, and from g or q
    return shared + scoring + ([] if lowest else through_x)


def _head(sizes: Sizes) -> list[Product]:
    b, d, k = sizes.rows, sizes.hidden_size, sizes.outputs
    return [Product(b, d, k), Product(b, k, d), Product(k, b, d, weight_gradient=True)]


def runner(products: list[Product], device: str, dtype: torch.dtype) -> Callable[[], None]:
    """A call that does all of them into memory that is there already."""
    random = torch.Generator().manual_seed(0)
    made: dict[tuple[int, ...], Tensor] = {}

    def matrix(*shape: int) -> Tensor:
        if shape not in made:
            made[shape] = torch.randn(shape, generator=random).to(device, dtype)
        return made[shape]

    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    for product in products:
        if product.batch > 1:
            operands = (
                matrix(product.batch, product.rows, product.inner),
                matrix(product.batch, product.inner, product.columns),
            )
            shape: tuple[int, ...] = (product.batch, product.rows, product.columns)
        elif product.weight_gradient:
            operands = (matrix(product.inner, product.rows).t(), matrix(product.inner, product.columns))
            shape = (product.rows, product.columns)
        else:
            operands = (matrix(product.rows, product.inner), matrix(product.columns, product.inner).t())
            shape = (product.rows, product.columns)
        calls += [(*operands, torch.empty(shape, device=device, dtype=dtype))] * product.count

    @torch.inference_mode()
    def run() -> None:
        for left, right, out in calls:
            torch.matmul(left, right, out=out)

    return run

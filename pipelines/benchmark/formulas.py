"""What a training step and a fusion cost on paper: matrix products, bytes and parameters.

Shapes: B rows, T tokens, M = B·T, L layers, D hidden size, I width of the feed-forward, H heads, R bottleneck size,
N sources, K outputs. Counts are per token and layer unless stated otherwise; a float is 4 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.benchmark.cases import OUTPUTS, Setup

FLOAT = 4  # bytes
STATE = 2  # floats that AdamW keeps beside each parameter


@dataclass(frozen=True)
class Backbone:
    """gated: the feed-forward has three matrices and not two, as in Llama."""

    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    gated: bool = False

    @classmethod
    def read(cls, folder: str) -> Backbone:
        """The sizes of a folder that `transformers` loads."""
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        return cls(folder, *(config[key] for key in keys))


BERT_LARGE = Backbone("BERT-large", 24, 1024, 4096, 16)
DECODER_7B = Backbone("a decoder of 7 billion parameters", 32, 4096, 11008, 32, gated=True)


def folded(n: int, r: int, d: int, tokens: int) -> float:
    """Multiply-adds of our fusion, forward in training: no loop over sources.

    A batch of more tokens than D multiplies query and key first: D³ per batch for D² per token.
    """
    return 3 * n * r * d + (2 + d / tokens if tokens > d else 3) * d**2


def plain(n: int, r: int, d: int) -> int:
    """Multiply-adds of the equations as they are written: a key and a value of size D for every source."""
    return 2 * n * r * d + (2 * n + 1) * d**2


def merged(n: int, r: int, d: int) -> int:
    """Multiply-adds of our inference, with the D × D products folded into the adapters."""
    return 3 * n * r * d + 2 * n * d


def frozen(backbone: Backbone) -> int:
    """Multiply-adds of a frozen layer, forward, without attention's products between tokens."""
    d, matrices = backbone.hidden_size, 3 if backbone.gated else 2
    return 4 * d**2 + matrices * d * backbone.intermediate_size


def inference(backbone: Backbone, setup: Setup, n: int, r: int) -> int:
    """Multiply-adds of a whole batch through all layers, with merged fusions, and the head."""
    d = backbone.hidden_size
    per_token = frozen(backbone) + 2 * setup.tokens * d + merged(n, r, d)
    return setup.batch_size * (setup.tokens * backbone.layers * per_token + d * OUTPUTS)


def kept_frozen(backbone: Backbone) -> int:
    """Floats that a frozen layer keeps for backward.

    Attention keeps q, k, v, its output and a sum for each head; each layer norm its input and two numbers (one
    here, two of the slot's); the activation of the feed-forward its input, and a gated one both factors.
    A product with frozen weights keeps nothing.
    """
    d, wide = backbone.hidden_size, backbone.intermediate_size
    return 4 * d + backbone.heads + (3 if backbone.gated else 1) * wide + 2 * (d + 2)


def kept_folded(n: int, r: int, d: int, tokens: int, lowest: bool = False) -> int:
    """Floats that a slot with our fusion keeps: the second norm's input, x, the mean, z, p, and Wuᵀg.

    A batch of at most D tokens keeps q as well. In the lowest slot z needs no gradient, so Wuᵀg is not kept.
    """
    return (3 if tokens > d else 4) * d + 2 + (1 if lowest else 2) * n * r + n


def parameters(layers: int, d: int) -> int:
    """Trainable parameters of a fusion of any number of sources: Wq, bq, Wk, bk, Wv of all layers."""
    return layers * (3 * d**2 + 2 * d)


def training_bytes(backbone: Backbone, n: int, r: int, tokens: int) -> int:
    """Bytes between forward and backward of a later step, above those after loading.

    That is what is kept for backward, the optimizer's state, the gradients of the step before (Lightning drops
    them between forward and backward), Wv − I of the penalty, and the two gradients as wide as the feed-forward
    that the uppermost layer holds at once. The lowest layer runs without a gradient up to its slot.
    """
    d, layers = backbone.hidden_size, backbone.layers
    kept = (layers - 1) * (kept_frozen(backbone) + kept_folded(n, r, d, tokens))
    kept += kept_folded(n, r, d, tokens, lowest=True) + 2 * backbone.intermediate_size
    return FLOAT * (tokens * kept + (STATE + 1) * parameters(layers, d) + layers * d**2)


def on_paper(backbone: Backbone, n: int, r: int, tokens: int) -> dict[str, float]:
    """All figures of a backbone, computed and not measured."""
    d, layers = backbone.hidden_size, backbone.layers
    return {
        "multiply_adds_a_token_backbone": layers * frozen(backbone),
        "multiply_adds_a_token_folded": layers * folded(n, r, d, tokens),
        "multiply_adds_a_token_plain": layers * plain(n, r, d),
        "multiply_adds_a_token_merged": layers * merged(n, r, d),
        "bytes_kept_folded": FLOAT * tokens * layers * kept_folded(n, r, d, tokens),
        # The equations as they are written keep u, k and v of every source, x and q.
        "bytes_kept_plain": FLOAT * tokens * layers * ((3 * n + 2) * d + n),
        "bytes_kept_backbone": FLOAT * tokens * layers * kept_frozen(backbone),
        "parameters_trained": parameters(layers, d),
        "bytes_optimizer_state": FLOAT * STATE * parameters(layers, d),
        "bytes_stored_fusion": FLOAT * parameters(layers, d),
        "bytes_stored_sources": FLOAT * n * layers * (2 * d * r + r + d),
    }


# --- the lower bound: only the matrix products of a step --------------------------------------------
# They are counted by hand from the equations, so that products which a model does needlessly are not part of its own
# lower bound. Frozen weights get no gradient, and below the lowest adapter nothing runs backward.


class Product(NamedTuple):
    """`times` products of (rows, inner) with (inner, columns); `batch` of them in one call, for attention.

    weight_gradient: rows and columns are widths and inner is M: the memory layout of a weight's gradient.
    """

    rows: int
    inner: int
    columns: int
    times: int = 1
    batch: int = 1
    weight_gradient: bool = False


def multiply_adds(products: list[Product]) -> int:
    return sum(p.times * p.batch * p.rows * p.inner * p.columns for p in products)


def training_step(backbone: Backbone, setup: Setup, r: int, n: int | None) -> list[Product]:
    """Forward and backward of one adapter (N is None) or of a fusion, after every feed-forward."""
    rows, tokens, d, wide = setup.batch_size, setup.tokens, backbone.hidden_size, backbone.intermediate_size
    m, head, batch = rows * tokens, d // backbone.heads, rows * backbone.heads
    layers, upper = (
        backbone.layers,
        backbone.layers - 1,
    )  # the lowest layer does not run backward below its slot
    slot = _adapter(m, d, r) if n is None else _fusion(m, d, r, n)
    # Gradient of x, in the upper layers: from z, and of a fusion from g or q as well.
    to_input = [Product(m, r, d)] if n is None else [Product(m, n * r, d), Product(m, d, d)]
    return [
        Product(m, d, d, 4 * (layers + upper)),  # query, key, value and output, forward and backward
        Product(m, d, wide, layers + upper),
        Product(m, wide, d, layers + upper),
        Product(tokens, head, tokens, layers + upper, batch),  # q·k; gradient of p
        Product(tokens, tokens, head, layers + 3 * upper, batch),  # p·v; gradients of v, q and k
        *(product._replace(times=layers * product.times) for product in slot),
        *(product._replace(times=upper) for product in to_input),
        Product(rows, d, OUTPUTS),  # the head
        Product(rows, OUTPUTS, d),
        Product(OUTPUTS, rows, d, weight_gradient=True),
    ]


def _adapter(m: int, d: int, r: int) -> list[Product]:
    return [
        Product(m, d, r, 2),  # down; gradient of z
        Product(m, r, d),  # up
        Product(d, m, r, weight_gradient=True),
        Product(r, m, d, weight_gradient=True),
    ]


def _fusion(m: int, d: int, r: int, n: int) -> list[Product]:
    scoring = [  # Wk and Wq first
        Product(d, d, d, 3),  # M = Wkᵀ Wq, and from its gradient those of both
        Product(m, d, d),  # g
        Product(d, m, d, weight_gradient=True),  # of M
    ]
    if m <= d:
        scoring = [
            Product(m, d, d, 3),  # q, g; gradient of q
            Product(d, m, d, 2, weight_gradient=True),  # of Wq, Wk
        ]
    return [
        *scoring,
        Product(m, d, n * r, 3),  # x to z, g to the bottlenecks; gradient of p ⊙ z
        Product(m, n * r, d, 2),  # p ⊙ z to the mean; gradient of g
        Product(m, d, d, 2),  # o; gradient of the mean
        Product(m, d, n, 2),  # g·bu; gradient of p, through bu
        Product(m, n, d, 2),  # Σ p bu; gradient of g, through bu
        Product(m, d, 1),  # q·bk
        Product(d, m, d, weight_gradient=True),  # of Wv
        Product(m, 1, d),  # gradient of x or q, through bk
        Product(1, m, d, weight_gradient=True),  # of bk
    ]


def runner(products: list[Product], device: str, dtype: torch.dtype) -> Callable[[], None]:
    """A call that does all of them into memory that is allocated already."""
    random = torch.Generator().manual_seed(0)
    made: dict[tuple[int, ...], Tensor] = {}

    def matrix(*shape: int) -> Tensor:
        if shape not in made:
            made[shape] = torch.randn(shape, generator=random).to(device, dtype)
        return made[shape]

    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows, inner, columns, times, batch, weight_gradient in products:
        if batch > 1:
            operands = matrix(batch, rows, inner), matrix(batch, inner, columns)
        elif weight_gradient:
            operands = matrix(inner, rows).t(), matrix(inner, columns)
        else:
            operands = matrix(rows, inner), matrix(columns, inner).t()
        calls += [(*operands, torch.empty_like(operands[0] @ operands[1]))] * times

    @torch.inference_mode()
    def run() -> None:
        for left, right, out in calls:
            torch.matmul(left, right, out=out)

    return run

"""Computed costs of training steps and fusions: multiply-adds, bytes and parameters.

Shapes: B examples, T tokens, M = B·T, L layers, D hidden size, I intermediate size, H heads, R bottleneck size,
N sources, K outputs. Counts are per token and layer unless stated otherwise; a float has 4 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fusion.layers.products import cheapest, multiply_adds
from pipelines.benchmark.cases import OUTPUTS, Setup

FLOAT = 4  # bytes
STATE = 2  # floats of AdamW's state per parameter


@dataclass(frozen=True)
class Backbone:
    """Sizes of a backbone. `gated`: its feed-forward has three matrices instead of two, as in Llama."""

    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    gated: bool = False

    @classmethod
    def read(cls, folder: str) -> Backbone:
        """Read the sizes from a folder that `transformers` can load."""
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        return cls(folder, *(config[key] for key in keys))

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of a frozen layer, forward pass, without the attention products between tokens."""
        return 4 * self.hidden_size**2 + (3 if self.gated else 2) * self.hidden_size * self.intermediate_size

    @property
    def kept(self) -> int:
        """Floats that a frozen layer saves for the backward pass.

        Attention saves q, k, v, its output and a sum per head; each layer norm its input and two numbers (one layer
        norm is counted here, the other with the slot); the activation of the feed-forward its input, or both factors
        if it is gated. A product with frozen weights saves nothing.
        """
        d = self.hidden_size
        return 4 * d + self.heads + (3 if self.gated else 1) * self.intermediate_size + 2 * (d + 2)

    @property
    def parameters(self) -> int:
        """Trainable parameters of a fusion (any number of sources): Wq, bq, Wk, bk and Wv of all layers."""
        return self.layers * (3 * self.hidden_size**2 + 2 * self.hidden_size)


BERT_LARGE = Backbone("BERT-large", 24, 1024, 4096, 16)
DECODER_7B = Backbone("a decoder of 7 billion parameters", 32, 4096, 11008, 32, gated=True)


@dataclass(frozen=True)
class Chain:
    """Tokens times matrices of these sizes, in the order that is the cheapest in training: `ordered_product`."""

    tokens: int
    sizes: Sequence[int]
    trained: Sequence[bool]
    input_gradient: bool = True

    @property
    def cuts(self) -> tuple[int, ...]:
        return cheapest(self.tokens, self.sizes, self.trained, self.input_gradient)

    def multiply_adds(self, training: bool) -> int:
        """Return those of a batch, of the forward pass or also of the backward pass."""
        trained = [training and one for one in self.trained]
        return multiply_adds(self.tokens, self.sizes, trained, self.cuts, training and self.input_gradient)

    @property
    def kept(self) -> int:
        """Floats per token saved for the gradients of the matrices, without the tokens themselves."""
        groups = [(start, any(self.trained[start:end])) for start, end in pairwise(self.cuts)]
        return sum(self.sizes[start] for start, trained in groups if trained and start > 0)


def chains(n: int, r: int, d: int, tokens: int, lowest: bool = False) -> tuple[Chain, Chain]:
    """Return both chains of a fusion: the scores, x Wqᵀ Wk [Wu; bu], and the values, [p_n z_n]_n Wuᵀ Wvᵀ."""
    scores = Chain(tokens, (d, d, d, n * r + n), (True, True, False), not lowest)
    return scores, Chain(tokens, (n * r, d, d), (False, True))


def per_token(n: int, r: int, d: int, tokens: int) -> dict[str, float]:
    """Multiply-adds of a fusion in the forward pass of a batch with that many tokens."""
    ordered = sum(chain.multiply_adds(training=False) for chain in chains(n, r, d, tokens)) / tokens
    return {
        # In training, without a loop over the sources.
        "folded": n * r * d + ordered + n * d + n * d**2 / tokens,
        # Direct evaluation of the equations: a key and a value of size D for every source.
        "plain": 2 * n * r * d + (2 * n + 1) * d**2,
        # In inference, with the D × D matrices merged into the adapters.
        "merged": 3 * n * r * d + 2 * n * d,
    }


def training(backbone: Backbone, setup: Setup, n: int | None, r: int) -> int:
    """Minimum multiply-adds of a training step of a fusion, or of one adapter (`n` is `None`).

    Frozen weights need no gradient, and there is no backward pass below the lowest slot.
    """
    m, d, t = setup.batch_size * setup.tokens, backbone.hidden_size, setup.tokens
    forward, backward = backbone.layers, backbone.layers - 1
    total = (forward + backward) * m * backbone.multiply_adds + (2 * forward + 4 * backward) * m * t * d
    if n is None:  # down, up, and the gradients of z and both weights; the gradient of x
        total += (5 * forward + backward) * m * r * d
    else:
        for layer in range(forward):
            lowest = layer == 0
            total += (1 if lowest else 2) * m * n * r * d + 3 * m * n * d + 2 * n * d**2
            total += sum(chain.multiply_adds(training=True) for chain in chains(n, r, d, m, lowest))
    return total + 3 * setup.batch_size * d * OUTPUTS


def kept_folded(n: int, r: int, d: int, tokens: int, lowest: bool = False) -> int:
    """Floats that a slot with a folded fusion saves: the second norm's input, x, z, p, Wuᵀg, and the chains' products.

    In the lowest slot z needs no gradient, so Wuᵀg is not saved.
    """
    scores, values = chains(n, r, d, tokens, lowest)
    mixed = 0 if values.kept else n * r  # [p_n z_n]_n, if Wuᵀ Wvᵀ is multiplied first
    return 2 * d + 2 + (1 if lowest else 2) * n * r + n + scores.kept + values.kept + mixed


def training_bytes(backbone: Backbone, n: int, r: int, tokens: int) -> int:
    """Bytes between the forward and the backward pass of any step but the first, above those after loading.

    They are the tensors saved for the backward pass, the optimizer state, the gradients of the previous step (which
    Lightning sets to `None` between forward and backward), Wv − I of the penalty, and two gradients of the
    feed-forward's size in the top layer. The lowest layer computes no gradient below its slot.
    """
    d, layers = backbone.hidden_size, backbone.layers
    kept = (layers - 1) * (backbone.kept + kept_folded(n, r, d, tokens))
    kept += kept_folded(n, r, d, tokens, lowest=True) + 2 * backbone.intermediate_size
    return FLOAT * (tokens * kept + (STATE + 1) * backbone.parameters + layers * d**2)


def predicted(backbone: Backbone, setup: Setup, n: int, r: int) -> dict[str, float]:
    """Return the costs of a whole batch, which the measured ones are compared with."""
    m, d = setup.batch_size * setup.tokens, backbone.hidden_size
    layer = backbone.multiply_adds + 2 * setup.tokens * d + per_token(n, r, d, m)["merged"]
    return {
        "train_multiply_adds": training(backbone, setup, n, r),
        "infer_multiply_adds": m * backbone.layers * layer + setup.batch_size * d * OUTPUTS,
        "predicted_peak_bytes": training_bytes(backbone, n, r, m),
    }


def on_paper(backbone: Backbone, n: int, r: int, tokens: int) -> dict[str, Any]:
    """Return all computed costs of a backbone."""
    d, layers = backbone.hidden_size, backbone.layers
    return {
        "backbone": backbone.name,
        "sources": n,
        "bottleneck": r,
        "tokens": tokens,
        "multiply_adds_a_token_backbone": layers * backbone.multiply_adds,
        **{f"multiply_adds_a_token_{way}": layers * count for way, count in per_token(n, r, d, tokens).items()},
        "bytes_kept_folded": FLOAT * tokens * layers * kept_folded(n, r, d, tokens),
        # Direct evaluation saves u, k and v of every source, x and q.
        "bytes_kept_plain": FLOAT * tokens * layers * ((3 * n + 2) * d + n),
        "bytes_kept_backbone": FLOAT * tokens * layers * backbone.kept,
        "parameters_trained": backbone.parameters,
        "bytes_optimizer_state": FLOAT * STATE * backbone.parameters,
        "bytes_stored_fusion": FLOAT * backbone.parameters,
        "bytes_stored_sources": FLOAT * n * layers * (2 * d * r + r + d),
    }

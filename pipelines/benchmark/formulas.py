"""What steps and fusions cost on paper: matrix products, bytes and parameters.

Shapes: B rows, T tokens, M = B·T, L layers, D hidden size, I width of the feed-forward, H heads, R bottleneck size,
N sources, K outputs. Counts are per token and layer unless stated otherwise; a float is 4 bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

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
    m, d = setup.batch_size * setup.tokens, backbone.hidden_size
    layer = frozen(backbone) + 2 * setup.tokens * d + merged(n, r, d)
    return m * backbone.layers * layer + setup.batch_size * d * OUTPUTS


def training(backbone: Backbone, setup: Setup, n: int | None, r: int) -> int:
    """Multiply-adds that a training step needs at least, of one adapter (N is None) or of a fusion.

    Frozen weights get no gradient, and below the lowest slot nothing runs backward. A fusion of few tokens multiplies
    x with Wq and Wk; one of many computes Wkᵀ Wq first.
    """
    m, d, t = setup.batch_size * setup.tokens, backbone.hidden_size, setup.tokens
    forward, backward = backbone.layers, backbone.layers - 1
    total = (forward + backward) * m * frozen(backbone) + (2 * forward + 4 * backward) * m * t * d
    if n is None:  # down, up, and the gradients of z and both weights; the gradient of x
        total += (5 * forward + backward) * m * r * d
    else:
        scores = 2 * m * d**2 + 3 * d**3 if m > d else 5 * m * d**2
        total += forward * (scores + 3 * m * d**2 + m * d * (5 * n * r + 4 * n + 3))
        total += backward * m * d * (n * r + d)
    return total + 3 * setup.batch_size * d * OUTPUTS


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

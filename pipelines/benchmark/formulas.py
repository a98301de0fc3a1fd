"""What a fusion costs on paper: products, bytes and parameters as functions of N, R, D.

Shapes: L layers, D hidden size, I width inside the feed-forward, H heads, R bottleneck size, N sources.
All counts are per token where nothing else is said; a float is 4 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4  # bytes
STATE = 2  # floats that AdamW keeps beside each parameter


@dataclass(frozen=True)
class Backbone:
    """gated: the feed-forward has three matrices and not two (Llama and its kin)."""

    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    gated: bool = False


BERT_LARGE = Backbone("BERT-large", 24, 1024, 4096, 16)
DECODER_7B = Backbone("a decoder of 7 billion parameters", 32, 4096, 11008, 32, gated=True)


def folded(sources: int, bottleneck: int, hidden_size: int, tokens: int) -> float:
    """Multiply-adds of our fusion in one layer and training step, forward: no loop over sources.

    A batch of more tokens than D multiplies query and key first: D³ once a batch for D² a token.
    """
    square = 2 + hidden_size / tokens if tokens > hidden_size else 3
    return 3 * sources * bottleneck * hidden_size + square * hidden_size**2


def plain(sources: int, bottleneck: int, hidden_size: int) -> int:
    """The same of the equations as they stand: a key and a value of size D for every source."""
    return 2 * sources * bottleneck * hidden_size + (2 * sources + 1) * hidden_size**2


def merged(sources: int, bottleneck: int, hidden_size: int) -> int:
    """The same of our inference, with the D × D products folded into the adapters."""
    return 3 * sources * bottleneck * hidden_size + 2 * sources * hidden_size


def frozen(backbone: Backbone) -> int:
    """Multiply-adds of one frozen layer, forward; attention's products between tokens are left out."""
    matrices = 3 if backbone.gated else 2
    return 4 * backbone.hidden_size**2 + matrices * backbone.hidden_size * backbone.intermediate_size


def kept_frozen(backbone: Backbone) -> int:
    """Floats that a frozen layer keeps for backward.

    Attention keeps q, k, v, its output and a sum for each head; each layer norm its input and two numbers (one
    here, two of the slot's); the activation of the feed-forward its input, and where it is gated both factors.
    A product with frozen weights keeps nothing.
    """
    d, wide = backbone.hidden_size, backbone.intermediate_size
    return 4 * d + backbone.heads + (3 if backbone.gated else 1) * wide + 2 * (d + 2)


def kept_adapter(bottleneck: int, hidden_size: int) -> int:
    """Floats that a slot with one adapter keeps: the second norm's input, x and z."""
    return 2 * hidden_size + 2 + bottleneck


def kept_folded(sources: int, bottleneck: int, hidden_size: int, tokens: int, lowest: bool = False) -> int:
    """Floats that a slot with our fusion keeps: the second norm's input, x, the mean, z, p, and Wuᵀg.

    A batch of no more tokens than D keeps q as well. In the lowest slot z needs no gradient, so that Wuᵀg is
    not kept.
    """
    wide = sources * bottleneck
    return (3 if tokens > hidden_size else 4) * hidden_size + 2 + (1 if lowest else 2) * wide + sources


def kept_plain(sources: int, hidden_size: int) -> int:
    """Floats that the equations as they stand keep: u, k and v of every source, x and q."""
    return (3 * sources + 2) * hidden_size + sources


def parameters(layers: int, hidden_size: int) -> int:
    """What trains in a fusion of any number of sources: Wq, bq, Wk, bk, Wv of every layer."""
    return layers * (3 * hidden_size**2 + 2 * hidden_size)


def adapter_parameters(layers: int, hidden_size: int, bottleneck: int) -> int:
    """What one source has."""
    return layers * (2 * hidden_size * bottleneck + bottleneck + hidden_size)


def training_bytes(backbone: Backbone, sources: int, bottleneck: int, tokens: int) -> int:
    """Bytes at the turn of a later step from forward to backward, above those after loading.

    That is what is kept for backward, the optimizer's state, the gradients of the step before (Lightning drops
    them between forward and backward), Wv − I of the penalty, and the two gradients as wide as the feed-forward
    that the uppermost layer holds at once. The lowest layer runs without a gradient up to its slot.
    """
    d, layers = backbone.hidden_size, backbone.layers
    kept = (layers - 1) * (kept_frozen(backbone) + kept_folded(sources, bottleneck, d, tokens))
    kept += kept_folded(sources, bottleneck, d, tokens, lowest=True) + 2 * backbone.intermediate_size
    return FLOAT * (tokens * kept + (STATE + 1) * parameters(layers, d) + layers * d**2)


def on_paper(backbone: Backbone, sources: int, bottleneck: int, tokens: int) -> dict[str, float]:
    """Everything for one backbone, computed and not measured."""
    d, layers = backbone.hidden_size, backbone.layers
    return {
        "multiply_adds_a_token_backbone": layers * frozen(backbone),
        "multiply_adds_a_token_folded": layers * folded(sources, bottleneck, d, tokens),
        "multiply_adds_a_token_plain": layers * plain(sources, bottleneck, d),
        "multiply_adds_a_token_merged": layers * merged(sources, bottleneck, d),
        "bytes_kept_folded": FLOAT * tokens * layers * kept_folded(sources, bottleneck, d, tokens),
        "bytes_kept_plain": FLOAT * tokens * layers * kept_plain(sources, d),
        "bytes_kept_backbone": FLOAT * tokens * layers * kept_frozen(backbone),
        "parameters_trained": parameters(layers, d),
        "bytes_optimizer_state": FLOAT * STATE * parameters(layers, d),
        "bytes_stored_fusion": FLOAT * parameters(layers, d),
        "bytes_stored_sources": FLOAT * sources * adapter_parameters(layers, d, bottleneck),
    }

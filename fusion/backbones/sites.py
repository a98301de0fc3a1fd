"""Sites at which a layer can have slots, described by the block layout (pre-norm, post-norm, ...), without torch.

r is the residual stream before a sublayer, h the sublayer's output before it is added to r, LN a norm of the backbone.
`reads` selects the input of a slot module:

    output   h                        (Houlsby et al. 2019)
    normed   LN(h + r), post-norm     (Pfeiffer et al. 2021)
    stream   h + r                    (Pfeiffer on pre-norm families)
    input    input of the sublayer    (He et al. 2022, parallel; LoRA)

Paths are dotted module paths inside a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class PostNorm:
    """y = LN(h + r), as in BERT; with an update u, y = LN(h + u + r).

    Attributes:
        norm: LN, called with h + r.
        output: last module whose output is h, before functional dropout if the backbone uses it (BART).
        reader: module whose first argument is the sublayer's input.
    """

    reads: ClassVar = ("output", "normed", "stream", "input")
    norm: str
    output: str
    reader: str


@dataclass(frozen=True)
class PreNorm:
    """y = r + h with h = f(LN(r)), as in GPT-2 and Llama; with an update u, h + u replaces h.

    The same attributes describe two more block layouts:

        sandwich norm (Gemma 2 and 3)    y = r + LN'(h + u)
        parallel block (GPT-J, Phi)      y = r + (h_attention + u_attention) + (h_feedforward + u_feedforward)

    Attributes:
        norm: LN, whose argument is r and whose output is the sublayer's input.
        output: last module whose output is h.
    """

    reads: ClassVar = ("output", "stream", "input")
    norm: str
    output: str


@dataclass(frozen=True)
class BeforeAttention:
    """Input of self-attention: it reads i + u instead of i; the residual stream is unchanged.

    Attributes:
        readers: modules whose first argument is i, in execution order.
    """

    reads: ClassVar = ("input",)
    readers: tuple[str, ...]


@dataclass(frozen=True)
class LinearLayer:
    """y = W x + b + u(x): an update with the input and output sizes of a linear layer (LoRA, Hu et al. 2022).

    Attributes:
        linear: a `torch.nn.Linear`, or transformers' `Conv1D`.
    """

    reads: ClassVar = ("input",)
    linear: str


Site = PostNorm | PreNorm | BeforeAttention | LinearLayer

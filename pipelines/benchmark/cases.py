"""Cases, settings and weights shared by both workers; imported by both interpreters."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch

TRAIN, INFER, LOWER_BOUND, LOOP, CLIPPED = "train", "infer", "floor", "loop", "clipped"
FUSION, ADAPTER, BARE, FULL = "fusion", "adapter", "bare", "full"
OUTPUTS = 3  # K of the head
# Standard deviations of the weights, before division by the square root of the fan-in. They are much larger than
# initial values, so that a wrong weight changes the logits by more than rounding errors.
SCALES = {"down": 1.0, "up": 0.25, "query": 0.6, "key": 0.6, "value": 0.6, "head": 6.0}


@dataclass(frozen=True)
class Case:
    """One measurement."""

    # train (a step), infer (a batch), floor (the matrix products of a step), loop (a step in Lightning's loop) or
    # clipped (the same step without Lightning)
    work: str
    method: str  # fusion, adapter (a single one), bare (no slot modules) or full (full fine-tuning)
    sources: int = 0  # of a fusion
    bottleneck: int = 0  # 0 without adapters
    dropout: bool = False  # the baseline's default dropout
    dtype: str = "float32"  # of the backbone's weights; in the baseline, of all weights

    def __str__(self) -> str:
        size = f" of {self.sources}" if self.method == FUSION else ""
        bottleneck = f", R {self.bottleneck}" if self.bottleneck else ""
        dtype = "" if self.dtype == "float32" else f", {self.dtype}"
        return f"{self.work} {self.method}{size}{bottleneck}{', its dropout' if self.dropout else ''}{dtype}"


@dataclass(frozen=True)
class Setup:
    """Settings sent to both workers before a request; `backbone` is a folder that both can load."""

    backbone: str
    batch_size: int
    tokens: int
    threads: int
    seed: int
    device: str = "cpu"
    precision: str = "float32"
    model_type: str = ""  # of a model with random weights, in place of `backbone`
    settings: dict[str, Any] = field(default_factory=dict)  # of its config


def fill(module: torch.nn.Module, setup: Setup, path: str) -> None:
    """Set a linear layer's weights to random values that depend only on the seed and the path ("adapter 3.0.down").

    The biases are nonzero, so that the comparison covers them; a value matrix is close to the identity.
    """
    kind = path.rpartition(".")[2]
    for name, tensor in module.state_dict().items():
        random = torch.Generator().manual_seed(zlib.crc32(f"{setup.seed} {path}.{name}".encode()))
        inputs = module.state_dict()["weight"].shape[1]
        tensor.copy_(torch.randn(tensor.shape, generator=random) * SCALES[kind] / inputs**0.5)
        if kind == "value":
            tensor.add_(torch.eye(inputs))

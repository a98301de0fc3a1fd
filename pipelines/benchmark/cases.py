"""What both workers share: what is measured, the settings, and the weights. For both interpreters."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

TRAIN, INFER, LOWER_BOUND, LOOP, CLIPPED = "train", "infer", "floor", "loop", "clipped"
FUSION, ADAPTER, BARE, FULL = "fusion", "adapter", "bare", "full"
OUTPUTS = 3  # K of the head
# Standard deviations of the weights, times the root of what they sum over. Far larger than initial values are: only
# then does a wrong weight change the scores by more than their rounding.
SCALES = {"down": 1.0, "up": 0.25, "query": 0.6, "key": 0.6, "value": 0.6, "head": 6.0}


@dataclass(frozen=True)
class Case:
    """One measured thing.

    work: train (a step), infer (a batch), floor (the matrix products of the training step alone),
        loop (a training step inside Lightning) or clipped (the same step without Lightning).
    method: fusion, adapter (one), bare (no slot modules), full (the whole backbone trains).
    sources: N of a fusion. bottleneck: R; 0 if there is none.
    dropout: whether the baseline keeps its default dropout.
    """

    work: str
    method: str
    sources: int = 0
    bottleneck: int = 0
    dropout: bool = False

    def __str__(self) -> str:
        size = f" of {self.sources}" if self.method == FUSION else ""
        bottleneck = f", R {self.bottleneck}" if self.bottleneck else ""
        return f"{self.work} {self.method}{size}{bottleneck}{', its dropout' if self.dropout else ''}"


@dataclass(frozen=True)
class Setup:
    """What both workers get before anything else; `backbone` is a folder that both can load."""

    backbone: str
    batch_size: int
    tokens: int
    threads: int
    seed: int
    device: str = "cpu"
    precision: str = "float32"


def fill(module: torch.nn.Module, setup: Setup, place: str) -> None:
    """Give a linear layer random weights, the same ones in both workers where the place is the same.

    Biases are not zero, so that a comparison covers them, and a value matrix is near the identity.

    Args:
        place: such as "adapter 3.0.down"; what follows the last dot is a key of `SCALES`.
    """
    kind = place.rpartition(".")[2]
    for name, tensor in module.state_dict().items():
        random = torch.Generator().manual_seed(zlib.crc32(f"{setup.seed} {place}.{name}".encode()))
        inputs = module.state_dict()["weight"].shape[1]
        tensor.copy_(torch.randn(tensor.shape, generator=random) * SCALES[kind] / inputs**0.5)
        if kind == "value":
            tensor.add_(torch.eye(inputs))

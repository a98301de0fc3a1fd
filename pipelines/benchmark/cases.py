"""What both workers share: what is measured, on which settings and weights. Plain modules, for both interpreters.

Shapes: L layers, D hidden size, R bottleneck size, N sources, K outputs. The weights file `R24.safetensors` has, for
R = 24, `adapters.SOURCE.LAYER.{down,up}.{weight,bias}` of every source, `fusion.LAYER.{query,key}.{weight,bias}`,
`fusion.LAYER.value.weight` and `head.{weight,bias}`. Biases are not zero, so that a comparison covers them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

TRAIN, INFER, LOWER_BOUND, LOOP, CLIPPED = "train", "infer", "floor", "loop", "clipped"
FUSION, ADAPTER, BARE, FULL = "fusion", "adapter", "bare", "full"
OUTPUTS = 3  # K of the head
# Standard deviations of the weights, times the root of what they sum over. Far larger than initial values are: only
# then does a wrong weight change the scores by more than their rounding.
DOWN_SCALE, UP_SCALE, FUSION_SCALE, HEAD_SCALE = 1.0, 0.25, 0.6, 6.0


@dataclass(frozen=True)
class Case:
    """One measured thing.

    work: train (a step), infer (a batch), floor (the matrix products of the training step alone),
        loop (a training step inside Lightning) or clipped (the same step without Lightning).
    method: fusion, adapter (one), bare (no slot modules), full (the whole backbone trains).
    sources: N of a fusion. bottleneck: R; 0 where there is none.
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
    """What both workers get before anything else.

    backbone: a folder that both can load. weights: the folder of the adapters, fusions and the head.
    """

    backbone: str
    weights: str
    batch_size: int
    tokens: int
    threads: int
    seed: int
    device: str = "cpu"
    precision: str = "float32"


def make_weights(setup: Setup, layers: int, hidden_size: int, bottleneck: int, sources: int) -> None:
    """Write the file for one bottleneck size."""
    random = torch.Generator().manual_seed(setup.seed)

    def normal(*shape: int, deviation: float) -> Tensor:
        return torch.randn(shape, generator=random) * deviation

    def linear(place: str, outputs: int, inputs: int, gain: float) -> dict[str, Tensor]:
        deviation = gain / inputs**0.5
        return {
            f"{place}.weight": normal(outputs, inputs, deviation=deviation),
            f"{place}.bias": normal(outputs, deviation=deviation),
        }

    d = hidden_size
    tensors = linear("head", OUTPUTS, d, HEAD_SCALE)
    for layer in range(layers):
        for name in ("query", "key"):
            tensors |= linear(f"fusion.{layer}.{name}", d, d, FUSION_SCALE)
        tensors[f"fusion.{layer}.value.weight"] = torch.eye(d) + normal(d, d, deviation=FUSION_SCALE / d**0.5)
    for source in range(sources):
        for layer in range(layers):
            tensors |= linear(f"adapters.{source}.{layer}.down", bottleneck, d, DOWN_SCALE)
            tensors |= linear(f"adapters.{source}.{layer}.up", d, bottleneck, UP_SCALE)
    save_file(tensors, Path(setup.weights) / f"R{bottleneck}.safetensors")


class Weights:
    """The tensors of one file, read one by one."""

    def __init__(self, setup: Setup, bottleneck: int) -> None:
        self._file = safe_open(Path(setup.weights) / f"R{bottleneck}.safetensors", framework="pt")

    def load_into(self, module: torch.nn.Module, place: str) -> None:
        """Copy `PLACE.weight`, and the bias where the module has one, into a linear layer."""
        module.load_state_dict(
            {name: self._file.get_tensor(f"{place}.{name}") for name in module.state_dict()}
        )

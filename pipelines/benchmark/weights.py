"""Random adapters, a fusion and a head, made once and read by both workers.

Shapes: L layers, D hidden size, R bottleneck size, N sources, K outputs. File `R24.safetensors` has, for
R = 24, `adapters.SOURCE.LAYER.{down,up}.{weight,bias}` of every source, `fusion.LAYER.{query,key}.{weight,bias}`,
`fusion.LAYER.value.weight` and `head.{weight,bias}`. Biases are not zero, so that a comparison sees them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

OUTPUTS = 3  # K of the head
# Deviations of the weights, times the root of what they sum over. Far larger than initial values are: only then
# does a wrong weight show in the scores, beyond their rounding.
DOWN, UP, FUSION, HEAD = 1.0, 0.25, 0.6, 6.0


def file_of(folder: str | Path, bottleneck: int) -> Path:
    return Path(folder) / f"R{bottleneck}.safetensors"


def make(
    folder: str | Path, layers: int, hidden_size: int, bottleneck: int, sources: int, seed: int
) -> dict[str, Tensor]:
    """Writes the file for one bottleneck size, and gives its tensors."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, deviation: float) -> Tensor:
        return torch.randn(shape, generator=random) * deviation

    def linear(place: str, outputs: int, inputs: int, gain: float) -> dict[str, Tensor]:
        deviation = gain / inputs**0.5
        return {
            f"{place}.weight": normal(outputs, inputs, deviation=deviation),
            f"{place}.bias": normal(outputs, deviation=deviation),
        }

    d = hidden_size
    tensors = linear("head", OUTPUTS, d, HEAD)
    for layer in range(layers):
        for name in ("query", "key"):
            tensors |= linear(f"fusion.{layer}.{name}", d, d, FUSION)
        tensors[f"fusion.{layer}.value.weight"] = torch.eye(d) + normal(d, d, deviation=FUSION / d**0.5)
    for source in range(sources):
        for layer in range(layers):
            tensors |= linear(f"adapters.{source}.{layer}.down", bottleneck, d, DOWN)
            tensors |= linear(f"adapters.{source}.{layer}.up", d, bottleneck, UP)
    path = file_of(folder, bottleneck)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return tensors


class Weights:
    """The tensors of one file, read one by one."""

    def __init__(self, folder: str | Path, bottleneck: int) -> None:
        self._file = safe_open(file_of(folder, bottleneck), framework="pt")

    def module(self, prefix: str, names: tuple[str, ...] = ("weight", "bias")) -> dict[str, Tensor]:
        """`prefix.weight` and `prefix.bias` as a module's state."""
        return {name: self._file.get_tensor(f"{prefix}.{name}") for name in names}

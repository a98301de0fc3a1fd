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
# Far larger than initial values are: only then does a wrong weight show in the scores, beyond their rounding.
ADAPTER_DEVIATION = 0.05
FUSION_DEVIATION = 0.03
HEAD_DEVIATION = 0.3


def file_of(folder: str | Path, bottleneck: int) -> Path:
    return Path(folder) / f"R{bottleneck}.safetensors"


def make(
    folder: str | Path, layers: int, hidden_size: int, bottleneck: int, sources: int, seed: int
) -> dict[str, Tensor]:
    """Writes the file for one bottleneck size, and gives its tensors."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, deviation: float) -> Tensor:
        return torch.randn(shape, generator=random) * deviation

    tensors: dict[str, Tensor] = {
        "head.weight": normal(OUTPUTS, hidden_size, deviation=HEAD_DEVIATION),
        "head.bias": normal(OUTPUTS, deviation=HEAD_DEVIATION),
    }
    for layer in range(layers):
        for name in ("query", "key"):
            place = f"fusion.{layer}.{name}"
            tensors[f"{place}.weight"] = normal(hidden_size, hidden_size, deviation=FUSION_DEVIATION)
            tensors[f"{place}.bias"] = normal(hidden_size, deviation=FUSION_DEVIATION)
        off = normal(hidden_size, hidden_size, deviation=FUSION_DEVIATION)
        tensors[f"fusion.{layer}.value.weight"] = torch.eye(hidden_size) + off
    for source in range(sources):
        for layer in range(layers):
            for name, shape in (("down", (bottleneck, hidden_size)), ("up", (hidden_size, bottleneck))):
                place = f"adapters.{source}.{layer}.{name}"
                tensors[f"{place}.weight"] = normal(*shape, deviation=ADAPTER_DEVIATION)
                tensors[f"{place}.bias"] = normal(shape[0], deviation=ADAPTER_DEVIATION)
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

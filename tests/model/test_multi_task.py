"""Multiple tasks in one forward equal each task alone, and share the layers below their adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fusion.backbones.load import load_backbone
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from fusion.model.inference import MultiTaskModel

IDS = torch.tensor([[2, 7, 8, 9, 3], [2, 10, 3, 0, 0]])
MASK = (IDS != 0).long()


def adapters(layers: list[int], site: str, size: int) -> dict[str, BottleneckAdapter]:
    made = {f"{layer}.{site}": BottleneckAdapter(32, size) for layer in layers}
    for adapter in made.values():
        nn.init.normal_(adapter.up.weight, std=0.5)
    return made


@pytest.mark.parametrize(
    ("site", "reads"),
    [("feedforward", "normed"), ("attention", "output"), ("feedforward", "input"), ("before_attention", "input")],
)
@pytest.mark.parametrize("first", [0, 1, 3])
def test_every_task_gets_its_own_scores(tiny_backbone: Path, site: str, reads: str, first: int) -> None:
    torch.manual_seed(0)
    tasks = [adapters(list(range(first, 3)), site, 4), adapters(list(range(max(first, 1), 3)), site, 2)]
    heads = [TaskHead(32, 2, pooling="mean"), TaskHead(32, 3)]
    backbone = load_backbone(str(tiny_backbone))
    multi_task = MultiTaskModel(backbone, tasks, reads, heads)
    rows = dict.fromkeys(range(3), 0)  # that each layer's attention has seen
    for layer in rows:
        query = backbone.model.get_submodule(f"encoder.layer.{layer}.attention.self.query")

        def count(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, layer: int = layer) -> None:
            rows[layer] += len(output)

        query.register_forward_hook(count)
    found = multi_task(IDS, MASK)
    for own, head, scores in zip(tasks, heads, found, strict=True):
        alone = AdaptedModel(load_backbone(str(tiny_backbone)), dict(own), reads, head).eval()
        torch.testing.assert_close(scores, alone(IDS, MASK), rtol=0, atol=1e-5)
    assert rows == {layer: 2 if layer < first else 4 for layer in range(3)}  # the layers below are shared

"""Arrow routing against its equation in loops and float64, and against peft's implementation."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig
from torch import Tensor, nn

from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.routing import Arrow, prototypes
from fusion.layers.slot_module import BatchContext
from tests.layers import test_sequence
from tests.layers.test_attention import HIDDEN, adapters, plain_output

MASK = test_sequence.MASK


def loras(ranks: list[int], scaling: float = 1.0, sizes: tuple[int, int] = (HIDDEN, HIDDEN)) -> list[BottleneckAdapter]:
    torch.manual_seed(1)
    found = []
    for rank in ranks:
        lora = BottleneckAdapter(sizes[0], rank, "identity", scaling, output_size=sizes[1], bias=False).double()
        for parameter in lora.parameters():
            nn.init.normal_(parameter)
        found.append(lora)
    return found


def test_prototypes_are_the_first_right_singular_vectors() -> None:
    every = loras([1, 3, 2], sizes=(HIDDEN, 7))
    found = prototypes(AdapterBank(every, [0, 1, 2], 3))
    for direction, lora in zip(found, every, strict=True):
        expected = torch.linalg.svd(lora.up.weight @ lora.down.weight).Vh[0]
        assert float(direction @ expected) ** 2 == pytest.approx(1.0, abs=1e-12)
    zero = loras([2])[0]
    nn.init.zeros_(zero.up.weight)  # a LoRA that was not trained
    assert float(prototypes(AdapterBank([zero], [0], 1)).norm()) == pytest.approx(1.0)


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("on", [[0, 1, 2, 3], [0, 3], []])
def test_the_equation(top_k: int, on: list[int]) -> None:
    every, x = adapters()[:4], test_sequence.texts()
    module = Arrow(AdapterBank(every, [0, 1, 2, 3], 5), top_k, temperature=0.7).double()
    seen: dict[str, Tensor] = {}
    active = torch.tensor([n in on for n in range(5)])
    found = module(x, BatchContext(MASK, sources_on=active, record=seen.__setitem__, slot="a"))
    for text in range(len(x)):
        for token in range(x.shape[1]):
            scores = {n: float((module.prototypes[n] @ x[text, token]).abs()) / 0.7 for n in on}
            best = sorted(on, key=lambda n: -scores[n])[:top_k]
            powers = {n: torch.tensor(scores[n], dtype=x.dtype).exp() for n in best}
            total = sum(powers.values())
            expected = sum((p / total * plain_output(every[n], x[text, token]) for n, p in powers.items()), 0 * x[0, 0])
            torch.testing.assert_close(found[text, token], expected, rtol=0, atol=1e-10)
            assert seen["a"][text, token].nonzero().flatten().tolist() == sorted(best)
    assert list(module.parameters()) == []


def test_peft_routes_alike() -> None:
    ranks, scaling = [3, 3, 3, 3], 2.0
    every, x = loras(ranks, scaling, (HIDDEN, 9)), test_sequence.texts()
    for lora in every:  # their 15 power iterations only converge if the first singular value is far from the others
        with torch.no_grad():
            lora.up.weight.mul_(torch.tensor([20.0, 1.0, 0.5]))
    config = ArrowConfig(top_k=2, router_temperature=0.5)
    config.task_adapter_names, config.gks_adapter_names = [f"task_{n}" for n in range(4)], []
    theirs = ArrowLoraLinearLayer(HIDDEN, config)
    down, up = nn.ModuleDict(), nn.ModuleDict()
    for n, lora in enumerate(every):
        down[f"task_{n}"], up[f"task_{n}"] = lora.down, lora.up
    theirs.build_prototypes(down, up)
    expected = theirs(x, down, up, nn.Identity(), dict.fromkeys(down, scaling))
    found = Arrow(AdapterBank(every, [0, 1, 2, 3], 4), 2, 0.5)(x, BatchContext(MASK))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # their vectors are float32

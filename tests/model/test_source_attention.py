"""Attention is measured over real tokens, and the sources with the most of it stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fusion.backbones.load import load_backbone
from fusion.data.batches import Batch
from fusion.layers.attention import AdapterFusion
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from fusion.model.source_attention import SourceAttention, measure_attention, most_attended
from fusion.store.manifest import Manifest
from tests.store.conftest import build

IDS = torch.tensor([[2, 7, 8, 9, 3], [2, 10, 3, 0, 0], [2, 11, 12, 3, 0]])


def batch(ids: Tensor, choice_counts: list[int] | None = None) -> Batch:
    counts = None if choice_counts is None else torch.tensor(choice_counts)
    rows = len(ids) if counts is None else len(counts)
    return Batch(ids, (ids != 0).long(), None, None, counts, torch.arange(rows), torch.ones(rows), rows)


def model_of(folder: Path) -> AdaptedModel:
    torch.manual_seed(0)
    slot_modules = {}
    for layer in (0, 2):
        adapters = [BottleneckAdapter(32, 4) for _ in range(2)]
        for parameter in (p for adapter in adapters for p in adapter.parameters()):
            nn.init.normal_(parameter, std=0.3)
        slot_modules[f"{layer}.feedforward"] = AdapterFusion(AdapterBank(adapters, [0, 2], 3))
        for parameter in slot_modules[f"{layer}.feedforward"].parameters():
            nn.init.normal_(parameter, std=0.1)
    return AdaptedModel(load_backbone(str(folder)), slot_modules, "normed", TaskHead(32, 1)).eval()


@pytest.mark.parametrize("choices", [False, True])
def test_the_mean_is_over_all_real_tokens(tiny_backbone: Path, choices: bool) -> None:
    model = model_of(tiny_backbone)
    sums = {slot: torch.zeros(3, dtype=torch.float64) for slot in ("0.feedforward", "2.feedforward")}
    tokens = 0
    with torch.no_grad():
        for row in IDS:
            real = row[row != 0].unsqueeze(0)
            seen: dict[str, Tensor] = {}
            model(real, torch.ones_like(real), record=seen.__setitem__)
            tokens += real.numel()
            for slot in sums:
                for token in range(real.numel()):
                    sums[slot] += seen[slot][0, token].double()
    batches = [batch(IDS[:2], [2] if choices else None), batch(IDS[2:], [1] if choices else None)]
    measured = measure_attention(model, batches, torch.device("cpu"))
    assert measured.keys() == sums.keys()
    found = {slot: torch.tensor(one.mean, dtype=torch.float64) for slot, one in measured.items()}
    for slot, total in sums.items():
        torch.testing.assert_close(found[slot], total / tokens, rtol=0, atol=1e-6)
        assert found[slot][1] == 0 and (found[slot] - 0.5).abs().min() > 1e-4


def sources(*slots: list[str]) -> list[Manifest]:
    return [
        build(name, adapter={"bottleneck_sizes": dict.fromkeys(own, 2)})
        for name, own in zip("abcd", slots, strict=False)
    ]


def test_the_most_attended_stay_in_the_sources_order() -> None:
    every = sources(["0.feedforward"], ["0.feedforward"], ["0.feedforward"], ["0.feedforward"])
    attention = {"0.feedforward": SourceAttention([0.3, 0.1, 0.2, 0.4], None)}
    assert most_attended(attention, every, 1) == {"0.feedforward": [3]}
    assert most_attended(attention, every, 2) == {"0.feedforward": [0, 3]}
    assert most_attended(attention, every, 3) == {"0.feedforward": [0, 2, 3]}


def test_only_sources_with_an_adapter_in_the_slot_can_stay() -> None:
    some = sources(["0.feedforward", "1.feedforward"], ["1.feedforward"], ["0.feedforward"])
    attention = {
        "0.feedforward": SourceAttention([1.0, 0.0, 0.0], None),
        "1.feedforward": SourceAttention([0.2, 0.8, 0.0], None),
    }
    assert most_attended(attention, some, 2) == {"0.feedforward": [0, 2], "1.feedforward": [0, 1]}
    assert most_attended(attention, some, 1) == {"0.feedforward": [0], "1.feedforward": [1]}
    alone = most_attended(
        {"1.feedforward": attention["1.feedforward"]},
        sources(["0.feedforward"], ["1.feedforward"], ["0.feedforward"]),
        2,
    )
    assert alone == {"1.feedforward": [1]}

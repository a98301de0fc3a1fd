"""The adapted model: what trains, what is frozen, how choices and dropout behave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion.backbones.load import load_backbone
from fusion.layers.attention import AdapterFusion
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter, WithTargetAdapter
from fusion.layers.heads import TaskHead
from fusion.layers.mixtures import ScaLearn, initial_scales
from fusion.model.adapted import AdaptedModel

IDS = torch.tensor([[2, 7, 8, 9, 3], [2, 10, 3, 0, 0], [2, 11, 12, 3, 0]])
MASK = (IDS != 0).long()


def adapted(folder: Path, **options: Any) -> AdaptedModel:
    torch.manual_seed(0)
    return AdaptedModel(
        load_backbone(str(folder)),
        {f"{layer}.feedforward": BottleneckAdapter(32, 4) for layer in (0, 2)},
        "normed",
        TaskHead(32, 2, pooling="mean"),
        **options,
    )


def fused(folder: Path) -> AdaptedModel:
    torch.manual_seed(0)
    banks = [AdapterBank([BottleneckAdapter(32, 4), BottleneckAdapter(32, 2)], [0, 1], 2) for _ in range(3)]
    slot_modules = {f"{layer}.feedforward": AdapterFusion(bank) for layer, bank in enumerate(banks)}
    return AdaptedModel(load_backbone(str(folder)), slot_modules, "normed", TaskHead(32, 2))


def test_exactly_the_adapters_and_the_head_train(tiny_backbone: Path) -> None:
    model = adapted(tiny_backbone)
    names = {
        f"slots.{layer}.feedforward.{part}.{kind}"
        for layer in (0, 2)
        for part in ("down", "up")
        for kind in ("weight", "bias")
    } | {"head.output.weight", "head.output.bias"}
    assert set(model.trainable()) == names
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names
    assert set(model.weight_state()) == {n.removeprefix("slots.") for n in names if n.startswith("slots")}


def test_of_a_fusion_query_key_value_and_the_head_train(tiny_backbone: Path) -> None:
    model = fused(tiny_backbone)
    parts = ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
    names = {f"slots.{layer}.feedforward.{part}" for layer in range(3) for part in parts}
    assert set(model.trainable()) == names | {"head.output.weight", "head.output.bias"}
    model.train()
    model(IDS, MASK).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(model.trainable())


def test_biases_and_the_value_matrix_take_no_weight_decay(tiny_backbone: Path) -> None:
    model = fused(tiny_backbone)
    decayed = set(model.trainable()) - model.undecayed()
    assert decayed == {
        *(f"slots.{n}.feedforward.{part}.weight" for n in range(3) for part in ("query", "key")),
        "head.output.weight",
    }


def test_penalty_is_summed_over_the_layers(tiny_backbone: Path) -> None:
    model = fused(tiny_backbone)
    each = 32 * 31 * 1e-12  # 1e-6 off the diagonal
    assert set(model.losses()) == {"value_penalty"}
    assert model.losses()["value_penalty"].item() == pytest.approx(3 * each, rel=1e-3)


def test_the_frozen_hash_covers_backbone_and_sources_but_no_trained_parameters(tiny_backbone: Path) -> None:
    model = fused(tiny_backbone)
    before = model.frozen_hashes()
    with torch.no_grad():
        next(iter(model.weight_state().values())).add_(1)
        model.head.state()["output.bias"].add_(1)
    assert model.frozen_hashes() == before
    bank = model.get_submodule("slots.1.feedforward.bank")
    bank.up_bias.add_(1)  # type: ignore[operator]
    changed = model.frozen_hashes()
    assert changed != before
    with torch.no_grad():
        model.backbone.get_parameter("embeddings.word_embeddings.weight")[0, 0] += 1e-6
    assert model.frozen_hashes() != changed


def test_a_parameter_shared_by_slots_is_counted_once(tiny_backbone: Path) -> None:
    torch.manual_seed(0)
    shared = initial_scales(2, 32)
    banks = [AdapterBank([BottleneckAdapter(32, 4), BottleneckAdapter(32, 2)], [0, 1], 2) for _ in range(3)]
    slot_modules = {f"{n}.feedforward": ScaLearn(bank, shared, shared=True) for n, bank in enumerate(banks)}
    model = AdaptedModel(load_backbone(str(tiny_backbone)), slot_modules, "normed", TaskHead(32, 2))
    assert set(model.weight_state()) == {"0.feedforward.scales"}
    assert "slots.0.feedforward.scales" in model.undecayed()
    before = model.frozen_hashes()
    with torch.no_grad():
        shared.add_(1)
    assert model.frozen_hashes() == before
    bank = model.get_submodule("slots.2.feedforward.bank")
    bank.up_bias.add_(1)  # type: ignore[operator]
    assert model.frozen_hashes() != before


def test_a_target_adapter_leaves_the_decay_of_the_composition_as_it_is(tiny_backbone: Path) -> None:
    torch.manual_seed(0)
    bank = AdapterBank([BottleneckAdapter(32, 4)], [0], 1)
    slot_module = WithTargetAdapter(AdapterFusion(bank), BottleneckAdapter(32, 4))
    model = AdaptedModel(load_backbone(str(tiny_backbone)), {"1.feedforward": slot_module}, "normed", TaskHead(32, 2))
    decayed = set(model.trainable()) - model.undecayed()
    parts = ("composition.query", "composition.key", "target.down", "target.up")
    assert decayed == {*(f"slots.1.feedforward.{part}.weight" for part in parts), "head.output.weight"}


def test_a_frozen_model_trains_nothing_and_is_stored_as_before(tiny_backbone: Path) -> None:
    model = fused(tiny_backbone)
    stored, before = set(model.weight_state()) | set(model.head.state()), model.frozen_hashes()
    model.freeze()
    assert model.trainable() == {} and not any(p.requires_grad for p in model.parameters())
    assert set(model.weight_state()) | set(model.head.state()) == stored
    now = model.frozen_hashes()
    assert now != before
    with torch.no_grad():
        next(iter(model.head.state().values())).add_(1)
    assert model.frozen_hashes() != now


@pytest.mark.parametrize("dropout", [True, False])
def test_backbone_dropout_is_active_only_if_enabled(tiny_backbone: Path, dropout: bool) -> None:
    model = adapted(tiny_backbone, backbone_dropout=dropout).train()
    assert torch.equal(model(IDS, MASK), model(IDS, MASK)) != dropout
    model.eval()
    assert torch.equal(model(IDS, MASK), model(IDS, MASK))


def test_padding_changes_nothing(tiny_backbone: Path) -> None:
    model = adapted(tiny_backbone).eval()
    wide = torch.nn.functional.pad(IDS, (0, 7))
    torch.testing.assert_close(model(IDS, MASK), model(wide, (wide != 0).long()), rtol=0, atol=1e-5)


def test_choices_are_gathered_per_example(tiny_backbone: Path) -> None:
    torch.manual_seed(0)
    backbone = load_backbone(str(tiny_backbone))
    model = AdaptedModel(backbone, {}, "normed", TaskHead(32, 1)).eval()
    singles = model(IDS, MASK).squeeze(-1)
    rows = model(IDS, MASK, choice_counts=torch.tensor([1, 2]))
    expected = torch.tensor([[singles[0], float("-inf")], [singles[1], singles[2]]])
    torch.testing.assert_close(rows, expected)


def test_recording_gives_each_slot_its_weights(tiny_backbone: Path) -> None:
    model = fused(tiny_backbone).eval()
    seen: dict[str, Tensor] = {}
    model(IDS, MASK, record=seen.__setitem__)
    assert list(seen) == ["0.feedforward", "1.feedforward", "2.feedforward"]
    assert all(weights.shape == (3, 5, 2) for weights in seen.values())


def test_masking_a_source_changes_the_scores_and_is_undone(tiny_backbone: Path) -> None:
    model = fused(tiny_backbone).eval()
    with torch.no_grad():
        for parameter in model.weight_state().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for module in model.modules():
            if isinstance(module, AdapterBank):
                module.up_weight.mul_(20)
    plain = model(IDS, MASK)
    masked = model(IDS, MASK, sources_on=torch.tensor([True, False]))
    assert not torch.allclose(plain, masked)
    assert torch.equal(model(IDS, MASK), plain)


@pytest.mark.parametrize("slot", ["3.feedforward", "0.pooler", "x.feedforward", "feedforward"])
def test_an_unknown_slot_is_refused(tiny_backbone: Path, slot: str) -> None:
    with pytest.raises(ValueError, match=r"no slot|expected LAYER"):
        AdaptedModel(load_backbone(str(tiny_backbone)), {slot: BottleneckAdapter(32, 4)}, "normed", TaskHead(32, 2))


def test_merged_scores_are_the_same_and_nothing_trains_any_more(tiny_backbone: Path) -> None:
    model = fused(tiny_backbone).eval()
    expected = model(IDS, MASK)
    recorded: dict[str, Tensor] = {}
    merged = model.merged()
    scores = merged(IDS, MASK, record=recorded.__setitem__)
    assert merged is model and not scores.equal(torch.zeros_like(scores))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert set(recorded) == {f"{layer}.feedforward" for layer in range(3)}
    assert set(merged.trainable()) == {"head.output.weight", "head.output.bias"}
    single = adapted(tiny_backbone).eval()
    expected = single(IDS, MASK)
    assert torch.equal(single.merged()(IDS, MASK), expected)

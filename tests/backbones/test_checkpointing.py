"""Gradient checkpointing: the same gradients to the bit, less kept in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusion.backbones.load import load_backbone
from fusion.layers.attention import AdapterFusion
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.layers.slot_module import SlotModule
from fusion.model.adapted import AdaptedModel
from tests.backbones import tiny_models

IDS = torch.tensor([[2, 7, 8, 9, 3, 0], [2, 10, 3, 0, 0, 0], [2, 11, 12, 5, 6, 3]])
MASK = (IDS != 0).long()


def build(folder: Path, slot_module: str, checkpointing: bool, dropout: bool = False) -> AdaptedModel:
    torch.manual_seed(0)
    slot_modules: dict[str, SlotModule] = {}
    for layer in (1, 2):
        if slot_module == "adapter":
            slot_modules[f"{layer}.feedforward"] = BottleneckAdapter(32, 4, dropout=0.3)
        else:
            bank = AdapterBank([BottleneckAdapter(32, 4), BottleneckAdapter(32, 2)], [0, 1], 2)
            slot_modules[f"{layer}.feedforward"] = AdapterFusion(bank, dropout=0.3)
    return AdaptedModel(load_backbone(str(folder)), slot_modules, "normed", TaskHead(32, 2), dropout, checkpointing)


def gradients(model: AdaptedModel, ids: Tensor = IDS) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    model(ids, (ids != 0).long()).pow(2).sum().backward()
    return {name: p.grad for name, p in model.trainable().items() if p.grad is not None}


def kept_bytes(model: AdaptedModel) -> int:
    """Bytes kept for backward, without the model's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = model(IDS.repeat(20, 4), MASK.repeat(20, 4))
    assert scores.requires_grad
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


@pytest.mark.parametrize("dropout", [False, True], ids=["backbone eval", "backbone dropout"])
@pytest.mark.parametrize("slot_module", ["adapter", "fusion"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra"])
def test_gradients_are_bit_equal_and_less_memory_is_used(
    make_backbone: Callable[..., Path], model_type: str, slot_module: str, dropout: bool
) -> None:
    folder = make_backbone(model_type)
    plain, checkpointed = (build(folder, slot_module, checkpointing, dropout) for checkpointing in (False, True))
    for _ in range(2):
        expected, found = gradients(plain.train()), gradients(checkpointed.train())
        assert set(found) == set(expected) == set(plain.trainable())
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        # and again after an evaluation
        with torch.inference_mode():
            assert torch.equal(plain.eval()(IDS, MASK), checkpointed.eval()(IDS, MASK))
    assert kept_bytes(checkpointed.train()) < 0.5 * kept_bytes(plain.train())
    assert set(plain.state_dict()) == set(checkpointed.state_dict())
    assert plain.frozen_hashes() == checkpointed.frozen_hashes()


def test_two_batches_before_one_backward(tiny_backbone: Path) -> None:
    """Each is computed again with its own mask, not with that of the last one."""
    results = []
    for checkpointing in (False, True):
        model = build(tiny_backbone, "fusion", checkpointing).train()
        torch.manual_seed(1)
        first, second = model(IDS, MASK, sources_on=torch.tensor([True, False])), model(IDS[1:2], MASK[1:2])
        (first.sum() + second.pow(2).sum()).backward()
        results.append([p.grad for p in model.trainable().values()])
    for expected, found in zip(*results, strict=True):
        assert expected is not None and found is not None
        assert torch.equal(expected, found)


def test_the_recorder_is_called_once(tiny_backbone: Path) -> None:
    model = build(tiny_backbone, "fusion", checkpointing=True).train()
    recorded: list[str] = []
    model(IDS, MASK, record=lambda place, weights: recorded.append(place)).sum().backward()
    assert recorded == ["1.feedforward", "2.feedforward"]


def test_a_copy_has_its_own_layers(tiny_backbone: Path) -> None:
    model = build(tiny_backbone, "adapter", checkpointing=True).train()
    expected = gradients(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.zero_()
    assert all(torch.equal(value, expected[name]) for name, value in gradients(other).items())


@pytest.mark.parametrize("name", tiny_models.SETTINGS)
def test_every_family(name: str) -> None:
    """Both stacks of an encoder–decoder model, and layers that share their weights, recompute the same gradients."""
    found = []
    for checkpointing in (False, True):
        backbone = tiny_models.tiny_backbone(name)
        torch.manual_seed(0)
        slots = {
            f"{stack}.{layer}.feedforward".lstrip("."): BottleneckAdapter(tiny_models.HIDDEN, 4, dropout=0.3).double()
            for stack in backbone.depths
            for layer in (0, 2)
        }
        head = TaskHead(tiny_models.HIDDEN, 2, pooling="mean").double()
        model = AdaptedModel(backbone, slots, "normed", head, gradient_checkpointing=checkpointing).train()
        found.append(gradients(model, tiny_models.IDS))
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys() and len(plain) == 4 * len(slots) + 2
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)

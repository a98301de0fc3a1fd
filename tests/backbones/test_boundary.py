"""Starting from the input of the lowest adapted layer gives what the whole pass gives, without the layers below it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fusion.backbones.families import FAMILIES
from fusion.backbones.layer_calls import compile_layers
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.layers.slot_module import BatchContext
from fusion.model.adapted import AdaptedModel
from tests.backbones.tiny_models import HIDDEN, IDS, MASK, SETTINGS, run, tiny_backbone

SLOTS = [["0.feedforward", "2.feedforward"], ["1.attention", "1.feedforward"], ["2.attention"], []]


def adapted(name: str, slots: list[str], reads: str, **options: Any) -> AdaptedModel:
    torch.manual_seed(0)
    modules = {slot: BottleneckAdapter(HIDDEN, 4).double() for slot in slots}
    head = TaskHead(HIDDEN, 2, pooling="mean").double()
    return AdaptedModel(tiny_backbone(name), modules, reads, head, **options)


def gradients(model: AdaptedModel, **features: Tensor) -> dict[str, Tensor]:
    parameters = model.trainable()
    scores = model(IDS, MASK, **features)
    found = torch.autograd.grad(scores.square().sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True)) | {"scores": scores.detach()}


def layers_that_run(model: AdaptedModel, stack: str = "") -> set[int]:
    """Filled in by the next passes: the layers of which a module with weights runs."""
    ran: set[int] = set()
    for number, layer in enumerate(model._family.layer_list(model.backbone, stack)):
        for module in layer.modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.register_forward_hook(lambda *_, number=number: ran.add(number))
    return ran


@pytest.mark.parametrize("slots", SLOTS, ids=lambda slots: "-".join(slots) or "none")
@pytest.mark.parametrize("name", [name for name in SETTINGS if len(FAMILIES[name.partition("/")[0]].stacks) == 1])
def test_scores_and_gradients_equal_those_of_the_full_forward(name: str, slots: list[str]) -> None:
    model = adapted(name, slots, "output").train()
    model.head.eval()
    expected = gradients(model)
    features = model.frozen_features(IDS, MASK)
    assert features.shape == (*IDS.shape, HIDDEN)
    model.take_features()
    model.take_features()  # a second call changes nothing
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=1e-12)  # nothing is skipped yet
    assert torch.equal(model.frozen_features(IDS, MASK), features)
    features[MASK == 0] = 0.0
    ran = layers_that_run(model)
    torch.testing.assert_close(gradients(model, features=features), expected, rtol=0, atol=1e-12)
    lowest = int(slots[0].split(".")[0]) if slots else 3
    assert ran == set(range(lowest, 3)) and model.boundary == (lowest if slots else None)


@pytest.mark.parametrize("name", [name for name in SETTINGS if len(FAMILIES[name.partition("/")[0]].stacks) > 1])
def test_the_encoder_of_an_encoder_decoder_starts_from_its_features(name: str) -> None:
    model = adapted(name, ["encoder.2.feedforward", "decoder.0.feedforward"], "output").eval()
    model._current.context = BatchContext(MASK)
    expected = run(model.backbone, name)
    features = model.frozen_features(IDS, MASK)
    model.take_features()
    model._current.features = features
    ran, decoded = layers_that_run(model, "encoder"), layers_that_run(model, "decoder")
    torch.testing.assert_close(run(model.backbone, name), expected, rtol=0, atol=1e-12)
    assert ran == {2} and decoded == {0, 1, 2} and model.boundary == 2
    alone = adapted(name, ["decoder.0.feedforward"], "output")
    with pytest.raises(RuntimeError, match="encoder features cannot be cached"):
        alone.take_features()


def test_impossible_boundaries_are_refused() -> None:
    model = adapted("bert", ["1.feedforward"], "normed", backbone_dropout=True)
    with pytest.raises(RuntimeError, match="take_features"):
        model(IDS, MASK, features=torch.zeros(*IDS.shape, HIDDEN))
    with pytest.raises(AssertionError, match="dropout"):
        model.train().frozen_features(IDS, MASK)


@pytest.mark.parametrize("how", ["checkpointed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_with_layers_that_are_computed_differently(how: str) -> None:
    slots = ["1.feedforward", "2.feedforward"]
    plain = adapted("bert", slots, "normed").train()
    other = adapted("bert", slots, "normed", gradient_checkpointing=how == "checkpointed").train()
    features = other.frozen_features(IDS, MASK)
    other.take_features()
    if how == "compiled":
        compile_layers(other._family.layer_list(other.backbone), backend="aot_eager")
    for model in (plain, other):
        model.head.eval()
    expected = gradients(plain)
    torch.testing.assert_close(gradients(other, features=features), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(other), expected, rtol=0, atol=1e-12)

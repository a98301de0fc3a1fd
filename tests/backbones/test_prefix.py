"""Starting from the frozen prefix gives what the whole pass gives, and runs nothing below the lowest slot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fusion.backbones.compiling import compile_layers
from fusion.backbones.families import FAMILIES
from fusion.backbones.load import load_backbone
from fusion.backbones.prefix import Skippable
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel

IDS = torch.tensor([[2, 7, 8, 9, 3], [2, 10, 3, 0, 0], [2, 11, 12, 3, 0]])
MASK = (IDS != 0).long()
SLOTS = [
    ["0.feedforward", "2.feedforward"],
    ["1.attention", "1.feedforward"],
    ["2.attention"],
    ["2.feedforward"],
    ["1.before_attention", "2.feedforward"],
    [],
]


def adapted(folder: Path, slots: list[str], reads: str, **options: Any) -> AdaptedModel:
    torch.manual_seed(0)
    backbone = load_backbone(str(folder))
    backbone.model.double()
    fillings = {slot: BottleneckAdapter(32, 4).double() for slot in slots}
    return AdaptedModel(backbone, fillings, reads, TaskHead(32, 2, pooling="mean").double(), **options)


def gradients(model: AdaptedModel, **prefix: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = model.trainable()
    scores = model(IDS, MASK, **prefix)
    found = torch.autograd.grad(scores.square().sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True)) | {"scores": scores.detach()}


@pytest.mark.parametrize("slots", SLOTS, ids=lambda slots: "-".join(slots) or "none")
@pytest.mark.parametrize("reads", ["normed", "output", "input"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_scores_and_gradients_are_those_of_the_whole_pass(
    model_type: str, reads: str, slots: list[str], make_backbone: Callable[..., Path]
) -> None:
    model = adapted(make_backbone(model_type), slots, reads).train()
    model.head.eval()
    expected = gradients(model)
    states = model.prefix_states(IDS, MASK)
    model.make_prefix_skippable()
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=1e-12)  # nothing is skipped yet
    assert torch.equal(model.prefix_states(IDS, MASK), states)
    states[MASK == 0] = 0.0
    ran: list[str] = []
    for name, module in model.backbone.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    torch.testing.assert_close(gradients(model, prefix=states), expected, rtol=0, atol=1e-12)
    lowest = int(slots[0].split(".")[0]) if slots else 3
    beyond = [name for name in ran if not name.startswith("encoder.layer.")]
    layers = {int(name.split(".")[2]) for name in ran if name.startswith("encoder.layer.")}
    assert beyond == [] and min(layers, default=3) == lowest
    at_entry = {name for name in ran if name.startswith(f"encoder.layer.{lowest}.")}
    before_attention = bool(slots) and slots[0].endswith("before_attention")
    assert any(".self." in name for name in at_entry) == before_attention
    if slots and slots[0].endswith("feedforward"):
        assert at_entry == {f"encoder.layer.{lowest}.output.LayerNorm"}


@pytest.mark.parametrize(("reads", "width"), [("normed", 32), ("output", 64), ("input", 64)])
def test_a_state_is_no_wider_than_needed(tiny_backbone: Path, reads: str, width: int) -> None:
    assert adapted(tiny_backbone, ["1.feedforward"], reads).prefix_states(IDS, MASK).shape == (3, 5, width)


def test_every_module_of_the_prefix_and_no_other_is_skippable(tiny_backbone: Path) -> None:
    model = adapted(tiny_backbone, ["1.feedforward", "2.attention"], "normed")
    assert model.entry == "1.feedforward"
    model.make_prefix_skippable()
    model.make_prefix_skippable()  # once is enough
    skippable = {name for name, module in model.backbone.named_modules() if isinstance(module, Skippable)}
    assert skippable == {
        "embeddings",
        "encoder.layer.0",
        "encoder.layer.1.attention",
        "encoder.layer.1.intermediate",
    }


def test_what_cannot_be_is_refused(tiny_backbone: Path) -> None:
    model = adapted(tiny_backbone, ["1.feedforward"], "normed", backbone_dropout=True)
    with pytest.raises(RuntimeError, match="make_prefix_skippable"):
        model(IDS, MASK, prefix=torch.zeros(3, 5, 32))
    with pytest.raises(AssertionError, match="dropout"):
        model.train().prefix_states(IDS, MASK)


@pytest.mark.parametrize("how", ["checkpointed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_with_layers_that_are_computed_in_another_way(tiny_backbone: Path, how: str) -> None:
    plain = adapted(tiny_backbone, ["1.feedforward", "2.feedforward"], "normed").train()
    other = adapted(
        tiny_backbone,
        ["1.feedforward", "2.feedforward"],
        "normed",
        gradient_checkpointing=how == "checkpointed",
    ).train()
    states = other.prefix_states(IDS, MASK)
    other.make_prefix_skippable()
    if how == "compiled":
        layers = other.backbone.get_submodule("encoder.layer")
        assert isinstance(layers, nn.ModuleList)
        compile_layers(layers, backend="aot_eager")
    for model in (plain, other):
        model.head.eval()
    expected = gradients(plain)
    torch.testing.assert_close(gradients(other, prefix=states), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(other), expected, rtol=0, atol=1e-12)

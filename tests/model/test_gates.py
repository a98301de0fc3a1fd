"""Gates in a model: what they read, how often they are evaluated, and that they work with every way to run a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusion.backbones.layer_calls import compile_layers
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.gates import AttentionGate, Gate, GatedMixture
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from tests.backbones.tiny_models import HIDDEN, IDS, LAYERS, MASK, linear_widths, tiny_backbone

SITES = {name: ["attention.query", "feedforward.down"] for name in ("bert", "llama")}
SITES["t5"] = ["attention.query", "attention.value"]


def gated(name: str, gate: str, lowest: int = 0, **options: Any) -> AdaptedModel:
    """A model with two LoRAs in two linear layers of each layer from `lowest` on."""
    backbone = tiny_backbone(name)
    torch.manual_seed(1)
    gates: dict[Any, AttentionGate] = {}
    modules = {}
    for stack, described in backbone.family.stacks.items():
        for layer in range(lowest, LAYERS):
            for site in SITES[name]:
                path = f"{described.layers}.{layer}.{described.sites[site].linear}"  # type: ignore[attr-defined]
                size, out = linear_widths(backbone.model.get_submodule(path))
                loras = [BottleneckAdapter(size, 2, "identity", output_size=out, bias=False) for _ in range(2)]
                group = (stack, layer) if gate == "layer" else stack
                place = (stack, layer)
                gates.setdefault(group, AttentionGate(place, HIDDEN, 2, rank=3))
                address = f"{f'{stack}.' if stack else ''}{layer}.{site}"
                modules[address] = GatedMixture(AdapterBank(loras, [0, 1], 2), gates[group])
    model = AdaptedModel(backbone, modules, "input", TaskHead(HIDDEN, 2, dropout=0.0, pooling="mean"), **options)
    for parameter in model.double().trainable().values():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def outcome(model: AdaptedModel, **inputs: Any) -> list[Tensor]:
    """The logits, and the gradients of a training step."""
    logits = model(IDS, MASK, **inputs)
    return [logits.detach(), *torch.autograd.grad(logits.sin().sum(), list(model.trainable().values()))]


@pytest.mark.parametrize("gate", ["layer", "model"])
@pytest.mark.parametrize("name", SITES)
def test_a_gate_reads_the_input_of_its_layer_once_for_all_slots(name: str, gate: str) -> None:
    model = gated(name, gate).eval()
    inputs: dict[tuple[str, int], Tensor] = {}
    for stack in model._family.stacks:
        for layer, module in enumerate(model._layers_of(stack)):
            module.register_forward_pre_hook(
                lambda module, args, keywords, place=(stack, layer): inputs.__setitem__(
                    place, args[0] if args else keywords["hidden_states"]
                ),
                with_kwargs=True,
            )
    calls: list[tuple[str, int] | None] = []
    for one in {one for one in model.slots.modules() if isinstance(one, Gate)}:
        one.register_forward_hook(lambda module, args, output: calls.append(module.place))
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        model(IDS, MASK, record=seen.__setitem__)
    stacks, layers = len(model._family.stacks), LAYERS if gate == "layer" else 1
    assert len(calls) == len(set(calls)) == stacks * layers
    for address, slot_module in model.slot_modules().items():
        of = slot_module.gate
        assert isinstance(of, AttentionGate) and of.place is not None
        assert of.place[1] == (
            int(address.removeprefix("encoder.").removeprefix("decoder.")[0]) if gate == "layer" else 0
        )
        scores = (inputs[of.place] @ of.query.weight.T + of.query.bias) @ of.keys.T
        torch.testing.assert_close(seen[address], scores.softmax(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", ["layer", "model"])
@pytest.mark.parametrize("name", SITES)
def test_recomputed_layers_and_cached_features_give_the_same_gradients(name: str, gate: str) -> None:
    expected = outcome(gated(name, gate))
    for found, one in zip(outcome(gated(name, gate, gradient_checkpointing=True)), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=1e-12)
    model = gated(name, gate, lowest=1)
    expected = outcome(model)
    model.eval()
    features = model.frozen_features(IDS, MASK)
    model.take_features()
    for found, one in zip(outcome(model.train(), features=features), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", ["layer", "model"])
def test_dropped_layers(gate: str) -> None:
    """A gate of the model still reads its layer if the slots there are not used, and all parameters have a gradient."""
    model = gated("bert", gate)
    logits, *gradients = outcome(model, first_layer=1)
    assert len(gradients) == len(model.trainable())
    modules = {address: module for address, module in model.slot_modules().items() if not address.startswith("0.")}
    fewer = AdaptedModel(tiny_backbone("bert"), modules, "input", model.head).double().eval()
    torch.testing.assert_close(fewer(IDS, MASK), logits, rtol=0, atol=1e-12)
    assert fewer.boundary == (1 if gate == "layer" else 0)


@pytest.mark.parametrize("gate", ["layer", "model"])
def test_compiled_layers(gate: str) -> None:
    expected, model = outcome(gated("bert", gate)), gated("bert", gate)
    compile_layers(model.layers(), "eager")
    for found, one in zip(outcome(model), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=1e-10)

"""Slots in real architectures against the layers recomputed by hand from the backbone's own weights, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fusion.backbones.families import FAMILIES
from fusion.backbones.load import Backbone, fingerprint, load_backbone
from fusion.backbones.slots import LinearLayer, SlotAddress
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.layers.slot_module import BatchContext
from fusion.model.adapted import AdaptedModel
from tests.backbones import tiny_models
from tests.backbones.reference import last_states
from tests.backbones.tiny_models import DECODER_IDS, HIDDEN, MASK, SETTINGS, linear_widths, run

ADAPTED = (0, 2)  # the layer between them keeps its own output


def sites_that_read(backbone: Backbone, reads: str) -> list[str]:
    """The addresses of all slots with this reading, linear layers without those that the model does not have."""
    found = []
    for stack, described in backbone.family.stacks.items():
        layers = backbone.family.layer_list(backbone.model, stack)
        for layer in ADAPTED:
            there = {name for name, _ in layers[layer].named_modules()}
            found += [
                str(SlotAddress(stack, layer, site))
                for site, wiring in described.sites.items()
                if reads in wiring.reads and (not isinstance(wiring, LinearLayer) or wiring.linear in there)
            ]
    return found


def adapters_for(backbone: Backbone, addresses: list[str], init: str = "bert") -> dict[str, BottleneckAdapter]:
    torch.manual_seed(3)
    made = {}
    for text in addresses:
        address = SlotAddress.parse(text)
        wiring = backbone.family.stacks[address.stack].sites[address.site]
        width = output = HIDDEN
        if isinstance(wiring, LinearLayer):
            layer = backbone.family.layer_list(backbone.model, address.stack)[address.layer]
            width, output = linear_widths(layer.get_submodule(wiring.linear))
        made[text] = BottleneckAdapter(width, 4, "silu", init=init, output_size=output).double()
        for parameter in made[text].parameters() if init == "bert" else ():
            nn.init.normal_(parameter, std=0.2)
    return made


def adapted(backbone: Backbone, adapters: dict[str, BottleneckAdapter], reads: str) -> AdaptedModel:
    model = AdaptedModel(backbone, adapters, reads, TaskHead(HIDDEN, 2).double()).eval()
    model._current.context = BatchContext(MASK)
    return model


def real(states: Tensor) -> Tensor:
    """Without what is computed at padding, which means nothing."""
    return states if states.shape[1] == DECODER_IDS.shape[1] else states[MASK.bool()]


CASES = [
    (name, reads)
    for name in SETTINGS
    for reads in ("output", "normed", "stream", "input")
    if any(reads in wiring.reads for wiring in FAMILIES[name.partition("/")[0]].first_stack.sites.values())
]


def test_every_family_has_a_tiny_model() -> None:
    assert {name.partition("/")[0] for name in SETTINGS} == set(FAMILIES)


@pytest.mark.parametrize(("name", "reads"), CASES)
def test_slots_equal_a_manual_computation_of_the_layers(name: str, reads: str) -> None:
    backbone = tiny_models.tiny_backbone(name)
    without = run(backbone.model, name)
    addresses = sites_that_read(backbone, reads)
    adapters = adapters_for(backbone, addresses)
    names = list(adapters)
    expected = last_states(backbone, adapters, reads)
    found = run(adapted(backbone, adapters, reads).backbone, name)
    torch.testing.assert_close(real(found), real(expected), rtol=0, atol=1e-10)
    assert (real(expected) - real(without)).abs().max() > 0.01  # the adapters do something
    direction = torch.randn_like(real(found))
    parameters = {f"{at}.{n}": p for at in names for n, p in adapters[at].named_parameters()}
    gradients = [
        torch.autograd.grad((real(states) * direction).sum(), list(parameters.values())) for states in (found, expected)
    ]
    for parameter, one, two in zip(parameters, *gradients, strict=True):
        assert (one - two).abs().max() <= 1e-10 * max(1.0, float(two.abs().max())), parameter
        assert one.abs().max() > 0, f"nothing reaches {parameter}"


@pytest.mark.parametrize(("name", "reads"), CASES)
def test_a_slot_module_that_starts_at_zero_changes_nothing(name: str, reads: str) -> None:
    backbone = tiny_models.tiny_backbone(name)
    expected = run(backbone.model, name)
    adapters = adapters_for(backbone, sites_that_read(backbone, reads), init="zero_up")
    assert torch.equal(real(run(adapted(backbone, adapters, reads).backbone, name)), real(expected))


@pytest.mark.parametrize(("name", "reads"), CASES)
def test_gradients_reach_exactly_the_declared_parameters(name: str, reads: str) -> None:
    backbone = tiny_models.tiny_backbone(name)
    for parameter in backbone.model.parameters():
        parameter.requires_grad_(True)  # the model has to freeze them
    addresses = sites_that_read(backbone, reads)
    model = adapted(backbone, adapters_for(backbone, addresses), reads)
    real(run(model.backbone, name)).square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    declared = {name for name in model.trainable() if not name.startswith("head.")}
    assert reached == declared
    parts = ("down.weight", "down.bias", "up.weight", "up.bias")
    assert set(model.weight_state()) == {f"{address}.{part}" for address in addresses for part in parts}


def test_the_sites_of_a_family_exist_in_its_models() -> None:
    for name, family in FAMILIES.items():
        backbone = tiny_models.tiny_backbone(name)
        for stack, described in family.stacks.items():
            layer = family.layer_list(backbone.model, stack)[0]
            there = {path for path, _ in layer.named_modules()}
            for site, wiring in described.sites.items():
                paths = [value for value in vars(wiring).values() if isinstance(value, str)]
                missing = {path for path in (*paths, *getattr(wiring, "readers", ())) if path not in there}
                gated = {f"feedforward.{module}" for module in ("wi", "wi_0", "wi_1")}
                assert not missing or (name in ("t5", "mt5") and site in gated), (name, site, missing)


def test_addresses() -> None:
    for text, address in (
        ("4.feedforward", SlotAddress("", 4, "feedforward")),
        ("decoder.4.cross_attention", SlotAddress("decoder", 4, "cross_attention")),
        ("4.attention.query", SlotAddress("", 4, "attention.query")),
        ("encoder.12.attention.output", SlotAddress("encoder", 12, "attention.output")),
    ):
        assert SlotAddress.parse(text) == address and str(address) == text
    for text in ("", "4", "4.", "feedforward", "encoder.feedforward", "encoder.4", "-1.feedforward", "x.y.z"):
        with pytest.raises(ValueError, match=r"expected LAYER\.SITE or STACK\.LAYER\.SITE"):
            SlotAddress.parse(text)


def test_backbone_keeps_its_tensor_names_and_its_fingerprint(tiny_backbone: Path) -> None:
    backbone = load_backbone(str(tiny_backbone))
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    AdaptedModel(backbone, {"1.feedforward": BottleneckAdapter(32, 4)}, "normed", TaskHead(32, 2))
    after = dict(backbone.model.named_parameters())
    assert set(before) == set(after)
    assert fingerprint(backbone.model, backbone.family) == backbone.fingerprint


def test_uses_of_a_shared_layer_are_separate_modules_with_the_same_parameters() -> None:
    for name, groups in (("albert", [0, 0, 0]), ("albert/groups", [0, 1, 2])):
        layers = FAMILIES["albert"].layer_list(tiny_models.tiny_backbone(name).model)
        assert len({id(layer) for layer in layers}) == 3
        weights = [id(layer.get_submodule("albert_layers.0.ffn").weight) for layer in layers]
        assert [weights.index(weight) for weight in weights] == groups


def test_wrong_slots_are_refused() -> None:
    def build(name: str, address: str, reads: str) -> AdaptedModel:
        module = BottleneckAdapter(HIDDEN, 4).double()
        return AdaptedModel(tiny_models.tiny_backbone(name), {address: module}, reads, TaskHead(HIDDEN, 2))

    for name, address, reads, message in (
        ("bert", "0.feedforward", "both", "reads 'both', expected one of output, normed, stream, input"),
        ("bert", "0.before_attention", "normed", "reads 'normed', expected one of input"),
        ("bert", "0.attention.query", "output", "reads 'output', expected one of input"),
        ("bert", "3.feedforward", "output", "3 layers with the sites before_attention, attention, feedforward"),
        ("bert", "0.cross_attention", "output", "3 layers with the sites before_attention, attention, feedforward"),
        ("bert", "decoder.0.feedforward", "output", "no slot decoder.0.feedforward"),
        ("bart", "0.feedforward", "output", "the stack must be one of encoder, decoder"),
    ):
        with pytest.raises(ValueError, match=message):
            build(name, address, reads)

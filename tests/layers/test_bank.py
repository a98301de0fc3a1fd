"""Stacked adapters against the adapters one by one."""

from __future__ import annotations

import pytest
import torch

from fusion.layers.bank import AdapterBank, TaskSwitch
from fusion.layers.bottleneck import NONLINEARITIES, BottleneckAdapter
from fusion.layers.mixtures import FrozenAdapter, MeanMixture, ScaLearn, StaticMixture, average
from fusion.layers.slot_module import BatchContext


def adapters() -> list[BottleneckAdapter]:
    torch.manual_seed(0)
    made = [
        BottleneckAdapter(8, 2, "relu"),
        BottleneckAdapter(8, 5, "tanh", scaling=3.0),
        BottleneckAdapter(8, 3, "relu"),
    ]
    for adapter in made:
        for parameter in adapter.double().parameters():
            torch.nn.init.normal_(parameter)
    return made


def test_weighted_sums_equal_those_of_the_single_outputs() -> None:
    bank, x = AdapterBank(adapters(), [0, 1, 2], 3), torch.randn(2, 3, 8).double()
    p = torch.randn(2, 3, 3).double()
    outputs = torch.stack([a(x, BatchContext(torch.ones(2, 3))) for a in adapters()], dim=-2)
    z = bank.bottlenecks(x)
    assert z.shape == (2, 3, 3, 5)
    torch.testing.assert_close(bank.weighted_sum(p, z), torch.einsum("btn,btnd->btd", p, outputs))
    torch.testing.assert_close(bank.weighted_sum(p[0, 0], z), torch.einsum("n,btnd->btd", p[0, 0], outputs))


def linear_layer_sources() -> list[BottleneckAdapter]:
    """Two LoRAs and a bottleneck with biases, for a linear layer from 6 to 10."""
    torch.manual_seed(1)
    made = [
        BottleneckAdapter(6, 2, "identity", scaling=4.0, output_size=10, bias=False),
        BottleneckAdapter(6, 3, "relu", output_size=10),
        BottleneckAdapter(6, 1, "identity", output_size=10, bias=False),
    ]
    for adapter in made:
        for parameter in adapter.double().parameters():
            torch.nn.init.normal_(parameter)
    return made


def test_every_composition_of_a_linear_layer_equals_its_sum() -> None:
    sources, x = linear_layer_sources(), torch.randn(2, 4, 6).double()
    batch = BatchContext(torch.ones(2, 4), members=torch.tensor([2, 1]))
    outputs = [source(x, batch) for source in sources]
    bank = AdapterBank(sources, [0, 1, 2], 3)
    assert (bank.input_size, bank.output_size) == (6, 10)
    torch.testing.assert_close(outputs[0][0, 0], 4.0 * sources[0].up.weight @ sources[0].down.weight @ x[0, 0])
    scales = torch.nn.Parameter(torch.randn(3, 10).double())
    scaled = sum(scale * output for scale, output in zip(scales, outputs, strict=True))
    for layer, expected in (
        (MeanMixture(bank), sum(outputs) / 3),
        (StaticMixture(bank).double(), sum(outputs) / 3),
        (ScaLearn(bank, scales), scaled),
        (TaskSwitch(bank), torch.stack([outputs[2][0], outputs[1][1]])),
        (FrozenAdapter(sources[0]), outputs[0]),
        (average(sources[:1]), outputs[0]),
    ):
        torch.testing.assert_close(layer(x, batch), expected, msg=type(layer).__name__)


def test_a_bank_is_frozen_and_copies_its_sources() -> None:
    made = adapters()
    bank = AdapterBank(made, [0, 1, 2], 3)
    assert list(bank.parameters()) == []
    before = bank.up_bias.clone()
    with torch.no_grad():
        made[0].up.bias.add_(1)
    assert torch.equal(bank.up_bias, before)


def test_every_nonlinearity_maps_zero_to_zero() -> None:
    for function in NONLINEARITIES.values():
        assert function(torch.zeros(1)).item() == 0


@pytest.mark.parametrize(("positions", "total"), [([0, 1], 3), ([0, 0, 1], 3), ([2, 1, 0], 3), ([0, 1, 3], 3)])
def test_positions_that_do_not_fit_are_refused(positions: list[int], total: int) -> None:
    with pytest.raises(ValueError, match="increasing indices below"):
        AdapterBank(adapters(), positions, total)


def test_no_adapter_and_mixed_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        AdapterBank([], [], 1)
    with pytest.raises(ValueError, match=r"different sizes \(input, output\): \[\(8, 8\), \(9, 9\)\]"):
        AdapterBank([BottleneckAdapter(8, 2), BottleneckAdapter(9, 2)], [0, 1], 2)

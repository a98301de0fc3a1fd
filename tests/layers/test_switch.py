"""A slot with the adapters of multiple tasks against each task's adapter, example by example."""

from __future__ import annotations

import pytest
import torch

from fusion.layers.bank import AdapterBank, TaskSwitch
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.slot_module import BatchContext


@pytest.mark.parametrize("nonlinearities", [("relu", "relu"), ("tanh", "silu")])
def test_each_example_uses_the_adapter_of_its_task(nonlinearities: tuple[str, str]) -> None:
    torch.manual_seed(0)
    adapters = [BottleneckAdapter(8, 2 + n, name, scaling=n + 1.0) for n, name in enumerate(nonlinearities)]
    for adapter in adapters:
        for parameter in adapter.double().parameters():
            torch.nn.init.normal_(parameter)
    switch = TaskSwitch(AdapterBank(adapters, [0, 2], 3))
    members = torch.tensor([2, 0, 1, 2])
    x = torch.randn(4, 3, 8).double()
    context = BatchContext(torch.ones(4, 3), members=members)
    expected = torch.zeros_like(x)
    for row, member in enumerate(members.tolist()):
        if member != 1:  # that task has no adapter here
            expected[row] = adapters[member // 2](x[row : row + 1], context)[0]
    torch.testing.assert_close(switch(x, context), expected, rtol=0, atol=1e-12)
    assert list(switch.parameters()) == []


def test_without_adapters_an_error_is_raised() -> None:
    switch = TaskSwitch(AdapterBank([BottleneckAdapter(8, 2)], [0], 1))
    with pytest.raises(RuntimeError, match="members"):
        switch(torch.zeros(1, 2, 8), BatchContext(torch.ones(1, 2)))

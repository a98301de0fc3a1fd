"""The mean of weights, and an adapter that is frozen."""

from __future__ import annotations

import pytest
import torch

from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.mixtures import FrozenAdapter, average
from fusion.layers.slot_module import BatchContext
from tests.layers.test_attention import plain_output

HIDDEN = 6


def adapters(count: int, **options: float) -> list[BottleneckAdapter]:
    torch.manual_seed(0)
    made = [BottleneckAdapter(HIDDEN, 3, "tanh", 2.0, **options).double() for _ in range(count)]  # type: ignore[arg-type]
    for adapter in made:
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter)
    return made


X = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(1)).double()
CONTEXT = BatchContext(torch.ones(2, 3))


def test_every_weight_is_the_mean_of_the_sources() -> None:
    sources = adapters(3, dropout=0.2)
    mean = average(sources)
    assert (mean.nonlinearity, mean.scaling, mean.dropout.p) == ("tanh", 2.0, 0.2)
    assert [name for name, _ in mean.named_parameters()] == ["down.weight", "down.bias", "up.weight", "up.bias"]
    for name, parameter in mean.named_parameters():
        expected = sum(source.get_parameter(name) for source in sources) / 3
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-15)
        assert parameter.requires_grad
    outputs = [source.eval()(X, CONTEXT) for source in sources]
    assert not torch.allclose(mean.eval()(X, CONTEXT), sum(outputs) / 3)  # not the mean of what they say


def test_average_of_one_source_is_that_source() -> None:
    (source,) = adapters(1)
    mean = average([source])
    assert torch.equal(mean(X, CONTEXT), source(X, CONTEXT))
    with torch.no_grad():
        mean.up.weight.zero_()
    assert source.up.weight.any()


@pytest.mark.parametrize(
    "other",
    [BottleneckAdapter(6, 4, "tanh", 2.0), BottleneckAdapter(6, 3, "relu", 2.0), BottleneckAdapter(6, 3, "tanh")],
)
def test_other_kinds_cannot_be_averaged(other: BottleneckAdapter) -> None:
    with pytest.raises(ValueError, match="equal sizes and settings"):
        average([*adapters(1), other.double()])
    with pytest.raises(ValueError, match="equal sizes and settings"):
        average([])


def test_a_frozen_adapter_keeps_its_output_and_cannot_train() -> None:
    (source,) = adapters(1, dropout=0.9)
    frozen = FrozenAdapter(source).train()  # its dropout belonged to its own training
    expected = torch.stack([torch.stack([plain_output(source, token) for token in row]) for row in X])
    torch.testing.assert_close(frozen(X, CONTEXT), expected, rtol=0, atol=1e-12)
    assert list(frozen.parameters()) == []
    x = X.clone().requires_grad_()
    (one,) = torch.autograd.grad(frozen(x, CONTEXT).pow(2).sum(), [x])
    (two,) = torch.autograd.grad(source.eval()(x, CONTEXT).pow(2).sum(), [x])
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_learned_scalings_are_averaged_too() -> None:
    adapters = [BottleneckAdapter(8, 2, scaling="learned") for _ in range(2)]
    with torch.no_grad():
        adapters[0].get_parameter("scaling").fill_(3.0)
    assert average(adapters).get_parameter("scaling").item() == 2.0
    with pytest.raises(ValueError, match="equal sizes and settings"):
        average([adapters[0], BottleneckAdapter(8, 2, scaling=3.0)])

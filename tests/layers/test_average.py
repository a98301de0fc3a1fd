"""The mean of weights, and an adapter that is frozen."""

from __future__ import annotations

import pytest
import torch

from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.mixtures import FrozenAdapter, average, dare, ties
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


def test_merges_of_peft_are_equal() -> None:
    from peft.utils.merge_utils import ties as their_ties

    values = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2)).double()
    for density in (0.25, 0.5, 1.0):
        theirs = their_ties(list(values), torch.ones(3, dtype=values.dtype), density)
        torch.testing.assert_close(ties(values, density), theirs, rtol=0, atol=1e-12)
    assert torch.equal(ties(values[:1], 1.0), values[0])


def test_dare_is_the_mean_of_rescaled_entries() -> None:
    values = torch.randn(4, 2000, generator=torch.Generator().manual_seed(2)).double()
    found = dare(values, 0.25, torch.Generator().manual_seed(5))
    assert torch.equal(found, dare(values, 0.25, torch.Generator().manual_seed(5)))
    kept = torch.rand(values.shape, generator=torch.Generator().manual_seed(5)) < 0.25
    assert 0.2 < float(kept.double().mean()) < 0.3
    torch.testing.assert_close(found, torch.where(kept, 4 * values, 0.0).sum(0) / 4, rtol=0, atol=1e-12)
    torch.testing.assert_close(dare(values, 1.0, torch.Generator()), values.mean(0))


@pytest.mark.parametrize("merge", ["ties", "dare"])
def test_adapters_are_merged_by_tensor(merge: str) -> None:
    sources = adapters(3)
    merged = average(sources, merge, 0.5, seed=3)
    again = average(sources, merge, 0.5, seed=3)
    draws = torch.Generator().manual_seed(3)
    for name, parameter in merged.named_parameters():
        values = torch.stack([source.get_parameter(name) for source in sources]).detach()
        assert torch.equal(parameter, ties(values, 0.5) if merge == "ties" else dare(values, 0.5, draws))
        assert torch.equal(parameter, again.get_parameter(name)) and not torch.equal(parameter, values.mean(0))

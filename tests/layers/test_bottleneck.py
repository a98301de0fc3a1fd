"""One adapter: its equation, its initial values, its parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.slot_module import BatchContext

CONTEXT = BatchContext(torch.ones(2, 3))


@pytest.mark.parametrize("nonlinearity", ["relu", "gelu", "silu", "tanh"])
def test_equation(nonlinearity: str) -> None:
    torch.manual_seed(0)
    adapter = BottleneckAdapter(6, 2, nonlinearity, scaling=4.0).double()
    x = torch.randn(2, 3, 6).double()
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "relu": torch.relu,
        "gelu": torch.nn.GELU(),
        "silu": torch.nn.SiLU(),
        "tanh": torch.tanh,
    }
    z = functions[nonlinearity](x @ adapter.down.weight.T + adapter.down.bias)
    expected = 4.0 * (z @ adapter.up.weight.T + adapter.up.bias)
    torch.testing.assert_close(adapter(x, CONTEXT), expected)


def test_parameter_count_is_2dr_plus_r_plus_d() -> None:
    assert sum(p.numel() for p in BottleneckAdapter(768, 48).parameters()) == 2 * 768 * 48 + 48 + 768


def test_zero_up_is_initialized_as_the_identity() -> None:
    adapter = BottleneckAdapter(6, 2, init="zero_up")
    assert not adapter(torch.randn(2, 3, 6), CONTEXT).any()
    assert adapter.down.weight.any()


@pytest.mark.parametrize(("init", "std", "limit"), [("bert", 0.02, 0.2), ("houlsby", 0.01 * 0.88, 0.02)])
def test_initial_values(init: str, std: float, limit: float) -> None:
    torch.manual_seed(0)
    adapter = BottleneckAdapter(256, 64, init=init)
    for linear in (adapter.down, adapter.up):
        assert linear.weight.std().item() == pytest.approx(std, rel=0.05)
        assert linear.weight.abs().max().item() <= limit
        assert not linear.bias.any()


def test_dropout_is_active_in_training_only() -> None:
    torch.manual_seed(0)
    adapter, x = BottleneckAdapter(64, 8, dropout=0.5), torch.randn(2, 3, 64)
    assert (adapter.train()(x, CONTEXT) == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert (adapter.eval()(x, CONTEXT) != 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck_size": 0}, "at least 1"),
        ({"bottleneck_size": 2, "nonlinearity": "swishy"}, "swishy"),
        ({"bottleneck_size": 2, "init": "ones"}, "ones"),
    ],
)
def test_wrong_values_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BottleneckAdapter(6, **options)  # type: ignore[arg-type]

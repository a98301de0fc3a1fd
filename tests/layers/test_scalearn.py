"""ScaLearn against the sum of the scaled outputs, written out with loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.mixtures import MeanMixture, ScaLearn, initial_scales
from fusion.layers.slot_module import BatchContext
from tests.layers.test_attention import HIDDEN, adapters, plain_output

COUNT = 5


def bank() -> AdapterBank:
    return AdapterBank(adapters(), range(COUNT), COUNT)


def layer_of(width: int) -> ScaLearn:
    torch.manual_seed(3)
    return ScaLearn(bank(), nn.Parameter(torch.randn(COUNT, width, dtype=torch.float64)))


def texts() -> Tensor:
    torch.manual_seed(7)
    return torch.randn(2, 3, HIDDEN, dtype=torch.float64, requires_grad=True)


def plain(scales: Tensor, sources: list[BottleneckAdapter], x: Tensor) -> Tensor:
    """Token by token, source by source and dimension by dimension; scales: (N, W)."""
    rows = []
    for b in range(x.shape[0]):
        tokens = []
        for t in range(x.shape[1]):
            total = torch.zeros(HIDDEN, dtype=x.dtype)
            for n, adapter in enumerate(sources):
                u = plain_output(adapter, x[b, t])
                total = total + torch.stack([scales[n, d % scales.shape[1]] * u[d] for d in range(HIDDEN)])
            tokens.append(total)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def context(x: Tensor, **more: Tensor) -> BatchContext:
    return BatchContext(torch.ones(x.shape[:2]), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [1, HIDDEN])
def test_equals_the_sum_of_scaled_outputs(width: int) -> None:
    layer, x = layer_of(width), texts()
    found, expected = layer(x, context(x)), plain(layer.scales, adapters(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    direction = torch.randn_like(found)
    assert [name for name, _ in layer.named_parameters()] == ["scales"]
    one = torch.autograd.grad((found * direction).sum(), [layer.scales, x])
    two = torch.autograd.grad((expected * direction).sum(), [layer.scales, x])
    for here, there in zip(one, two, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-10)


@pytest.mark.parametrize("width", [1, HIDDEN])
def test_a_masked_source_has_no_effect(width: int) -> None:
    layer, x = layer_of(width), texts()
    on = torch.tensor([True, False, True, True, False])
    kept = [a for a, keep in zip(adapters(), on.tolist(), strict=True) if keep]
    found = layer(x, context(x, sources_on=on))
    torch.testing.assert_close(found, plain(layer.scales[on], kept, x), rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(found.sum(), [layer.scales])
    assert not gradient[~on].any() and gradient[on].any()
    none = layer(x, context(x, sources_on=torch.zeros(COUNT, dtype=torch.bool)))
    assert torch.equal(none, torch.zeros_like(none))


@pytest.mark.parametrize("width", [1, HIDDEN])
def test_one_factor_for_multiple_slots(width: int) -> None:
    torch.manual_seed(3)
    shared = nn.Parameter(torch.randn(COUNT, width, dtype=torch.float64))
    here, there = [0, 3, 4], [1, 3]
    slots = [
        ScaLearn(AdapterBank([adapters()[n] for n in positions], positions, COUNT), shared, shared=True)
        for positions in (here, there)
    ]
    x = texts()
    outputs = [slot(x, context(x)) for slot in slots]
    expected = [plain(shared[p], [adapters()[n] for n in p], x) for p in (here, there)]
    for one, two in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    (one,) = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), [shared])
    (two,) = torch.autograd.grad(expected[0].sum() + expected[1].sum(), [shared])
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    assert not one[2].any()
    assert len(list(nn.ModuleList(slots).parameters())) == 1
    on = torch.tensor([True, True, True, False, True])
    masked = slots[1](x, context(x, sources_on=on))
    torch.testing.assert_close(masked, plain(shared[[1]], [adapters()[1]], x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("width", [1, HIDDEN])
def test_the_mean_where_every_factor_is_one_over_n(width: int) -> None:
    layer, x = layer_of(width), texts()
    with torch.no_grad():
        layer.scales.fill_(1 / COUNT)
    torch.testing.assert_close(layer(x, context(x)), MeanMixture(bank())(x, context(x)), rtol=0, atol=1e-12)


def test_starts_near_the_mean() -> None:
    torch.manual_seed(0)
    scales = initial_scales(4, 2000)
    assert scales.shape == (4, 2000) and scales.requires_grad
    assert scales.mean().item() == pytest.approx(0.25, abs=1e-4)
    assert scales.std().item() == pytest.approx(0.001, rel=0.05)


def test_what_is_recorded() -> None:
    x, seen = texts(), list[Tensor]()
    few = AdapterBank(adapters()[:2], [1, 3], COUNT)
    uniform = nn.Parameter(torch.tensor([[-0.5], [2.0]], dtype=torch.float64))
    vectors = nn.Parameter(torch.randn(2, HIDDEN, dtype=torch.float64))
    for scales in (uniform, vectors):
        ScaLearn(few, scales)(x, BatchContext(torch.ones(2, 3), record=lambda _, w: seen.append(w)))
    assert [weights.shape for weights in seen] == [(2, 3, COUNT)] * 2
    expected = torch.tensor([0, -0.5, 0, 2.0, 0]).double().expand(2, 3, COUNT)
    torch.testing.assert_close(seen[0], expected)
    sizes = [sum(abs(vectors[n, d].item()) for d in range(HIDDEN)) / HIDDEN for n in range(2)]
    assert seen[1][1, 2].tolist() == pytest.approx([0, sizes[0], 0, sizes[1], 0])


def test_costs_no_more_per_token_than_the_mean() -> None:
    x = texts()
    flops = []
    for layer in (MeanMixture(bank()), layer_of(HIDDEN)):
        with FlopCounterMode(display=False) as counter:
            layer(x, context(x))
        flops.append(counter.get_total_flops())
    assert 0 < flops[1] <= flops[0]


@pytest.mark.parametrize(("shape", "shared"), [((4, 1), False), ((5, 2), False), ((2, 1), True), ((5,), False)])
def test_factors_of_another_shape_are_refused(shape: tuple[int, ...], shared: bool) -> None:
    with pytest.raises(ValueError, match="scales"):
        ScaLearn(bank(), nn.Parameter(torch.zeros(shape)), shared)


def test_has_no_weight_decay() -> None:
    assert layer_of(1).undecayed == ("scales",)

"""A trainable adapter beside a composition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusion.layers.attention import AdapterFusion, MergedFusion
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter, WithTargetAdapter
from fusion.layers.mixtures import ScaLearn, initial_scales
from fusion.layers.slot_module import BatchContext
from tests.layers.test_attention import HIDDEN, adapters, context, fusion

X = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(1)).double()


def with_target(init: str = "bert") -> WithTargetAdapter:
    torch.manual_seed(5)
    target = BottleneckAdapter(HIDDEN, 4, init=init).double()
    if init == "bert":
        for parameter in target.parameters():
            nn.init.normal_(parameter)
    return WithTargetAdapter(fusion(), target)


def test_the_sum_of_both_and_of_their_gradients() -> None:
    both, x = with_target(), X.clone().requires_grad_()
    one, two = both.composition(x, context(x)), both.target(x, context(x))
    found = both(x, context(x))
    torch.testing.assert_close(found, one + two, rtol=0, atol=1e-12)
    expected = torch.autograd.grad((one + two).pow(2).sum(), [x, *both.parameters()])
    for here, there in zip(torch.autograd.grad(found.pow(2).sum(), [x, *both.parameters()]), expected, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


def test_is_initialized_as_the_composition() -> None:
    both = with_target("zero_up")
    assert torch.equal(both(X, context(X)), both.composition(X, context(X)))


def test_names_losses_and_decay_pass_through() -> None:
    both = with_target()
    assert {name for name, _ in both.named_parameters()} == {
        *(f"composition.{n}" for n in ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")),
        *(f"target.{n}" for n in ("down.weight", "down.bias", "up.weight", "up.bias")),
    }
    assert both.undecayed == ("composition.value.weight",)
    assert AdapterFusion.undecayed == ("value.weight",)
    assert set(both.losses()) == {"value_penalty"}
    assert torch.equal(both.losses()["value_penalty"], both.composition.losses()["value_penalty"])
    scaled = ScaLearn(AdapterBank(adapters(), range(5), 5), initial_scales(5, 1))
    assert WithTargetAdapter(scaled, BottleneckAdapter(HIDDEN, 2)).undecayed == ("composition.scales",)


def test_merges_mergeable_modules() -> None:
    both = with_target().eval()
    merged = both.merged()
    assert isinstance(merged.composition, MergedFusion) and isinstance(both.composition, AdapterFusion)
    torch.testing.assert_close(merged(X, context(X)), both(X, context(X)), rtol=0, atol=1e-10)


def test_masking_the_sources_keeps_the_target_and_only_sources_are_recorded() -> None:
    both, seen = with_target().eval(), dict[str, Tensor]()
    off = torch.zeros(5, dtype=torch.bool)
    torch.testing.assert_close(both(X, context(X, sources_on=off)), both.target(X, context(X)))
    both(X, BatchContext(torch.ones(2, 3), record=seen.__setitem__, slot="0.feedforward"))
    assert list(seen) == ["0.feedforward"] and seen["0.feedforward"].shape == (2, 3, 5)

"""The mean and the static mixture against sums over the single outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.mixtures import MeanMixture, StaticMixture
from fusion.layers.slot_module import BatchContext


def sources() -> list[BottleneckAdapter]:
    torch.manual_seed(0)
    return [BottleneckAdapter(8, 2).double(), BottleneckAdapter(8, 3, "tanh").double()]


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)).double()
CONTEXT = BatchContext(torch.ones(2, 3))


def outputs() -> list[Tensor]:
    return [adapter(X, CONTEXT) for adapter in sources()]


def test_mean() -> None:
    layer = MeanMixture(AdapterBank(sources(), [0, 1], 2))
    assert list(layer.parameters()) == []
    torch.testing.assert_close(layer(X, CONTEXT), sum(outputs()) / 2)


def test_static_starts_as_the_mean_and_follows_its_weights() -> None:
    layer = StaticMixture(AdapterBank(sources(), [0, 1], 2)).double()
    assert {name for name, _ in layer.named_parameters()} == {"weight"}
    torch.testing.assert_close(layer(X, CONTEXT), sum(outputs()) / 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([3.0, 0.0]).log1p())  # softmax of log 4 and log 1: 0.8 and 0.2
    torch.testing.assert_close(layer(X, CONTEXT), 0.8 * outputs()[0] + 0.2 * outputs()[1])


def test_masking_a_source_gives_the_mean_of_the_others() -> None:
    layer = MeanMixture(AdapterBank(sources(), [0, 1], 2))
    on = BatchContext(torch.ones(2, 3), sources_on=torch.tensor([False, True]))
    torch.testing.assert_close(layer(X, on), outputs()[1])


def test_records_its_weights_for_every_token() -> None:
    seen: dict[str, Tensor] = {}
    layer = MeanMixture(AdapterBank(sources(), [0, 2], 3))
    layer(X, BatchContext(torch.ones(2, 3), record=seen.__setitem__, slot="0.feedforward"))
    torch.testing.assert_close(seen["0.feedforward"], torch.tensor([0.5, 0.0, 0.5]).double().expand(2, 3, 3))

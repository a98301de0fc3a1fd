"""The fusion with one decision a text against the equation, written out with loops and einsum in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusion.layers.attention import AdapterFusion, SequenceFusion
from fusion.layers.bank import AdapterBank
from fusion.layers.slot_module import BatchContext
from tests.layers.test_attention import HIDDEN, adapters, plain_output

MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]])


def fusion(**options: Any) -> SequenceFusion:
    torch.manual_seed(100)
    layer = SequenceFusion(AdapterBank(adapters(), range(5), 5), **options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def texts() -> Tensor:
    torch.manual_seed(7)
    return torch.randn(*MASK.shape, HIDDEN, dtype=torch.float64, requires_grad=True)


def plain(layer: SequenceFusion, x: Tensor, kept: list[int], noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """o: (B, T, D) and p: (B, kept); `noise` (B, kept) multiplies the scores, as dropout does."""
    sources = [adapters()[n] for n in kept]
    rows, weights = [], []
    for b in range(x.shape[0]):
        real = [t for t in range(x.shape[1]) if MASK[b, t]]
        mean = torch.stack([x[b, t] for t in real]).sum(0) / len(real)
        q = torch.einsum("ed,d->e", layer.query.weight, mean) + layer.query.bias
        scores = []
        for n, adapter in enumerate(sources):
            k = torch.einsum("ed,d->e", layer.key.weight, plain_output(adapter, mean)) + layer.key.bias
            scores.append(torch.dot(q, k) * (1 if noise is None else noise[b, n]) / layer.temperature)
        p = [torch.exp(s) / sum(torch.exp(o) for o in scores) for s in scores]
        tokens = []
        for t in range(x.shape[1]):
            mixed = sum(w * plain_output(a, x[b, t]) for w, a in zip(p, sources, strict=True))
            assert isinstance(mixed, Tensor)
            value = layer.value
            tokens.append(mixed if value is None else torch.einsum("ed,d->e", value.weight, mixed))
        rows.append(torch.stack(tokens))
        weights.append(torch.stack(p))
    return torch.stack(rows), torch.stack(weights)


@pytest.mark.parametrize("value_matrix", [True, False])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("mode", ["evaluation", "training", "training with dropout"])
def test_folded_equals_plain(value_matrix: bool, rank: int | None, mode: str) -> None:
    dropout = 0.4 if mode == "training with dropout" else 0.0
    layer = fusion(value_matrix=value_matrix, rank=rank, temperature=1.7, dropout=dropout)
    layer.train(mode != "evaluation")
    x, noise = texts(), None
    if dropout:
        torch.manual_seed(8)
        noise = torch.nn.functional.dropout(torch.ones(3, 5, dtype=torch.float64), dropout)
        assert (noise == 0).any() and (noise > 1).any()
    torch.manual_seed(8)
    folded = layer(x, BatchContext(MASK))
    expected, _ = plain(layer, x, list(range(5)), noise)
    torch.testing.assert_close(folded, expected, rtol=0, atol=1e-10)
    direction = torch.randn_like(folded)
    wanted = dict(layer.named_parameters()) | {"x": x}
    if mode == "evaluation":
        del wanted["key.bias"]
    one = torch.autograd.grad((folded * direction).sum(), list(wanted.values()))
    two = torch.autograd.grad((expected * direction).sum(), list(wanted.values()))
    for name, here, there in zip(wanted, one, two, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-10, msg=f"the gradients of {name} differ")


@pytest.mark.parametrize("merge", [False, True])
def test_masked_sources_have_no_effect(merge: bool) -> None:
    layer, x = fusion().eval(), texts().detach()
    slot_module = layer.merged() if merge else layer
    on = torch.tensor([True, False, True, True, False])
    expected, _ = plain(layer, x, [0, 2, 3])
    found = slot_module(x, BatchContext(MASK, sources_on=on))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    none = slot_module(x, BatchContext(MASK, sources_on=torch.zeros(5, dtype=torch.bool)))
    assert torch.equal(none, torch.zeros_like(none))


@pytest.mark.parametrize("value_matrix", [True, False])
@pytest.mark.parametrize("rank", [None, 3])
def test_merged_equals_folded_without_a_square_matrix(value_matrix: bool, rank: int | None) -> None:
    layer, x = fusion(value_matrix=value_matrix, rank=rank, temperature=2.5).eval(), texts().detach()
    merged = layer.merged()
    torch.testing.assert_close(merged(x, BatchContext(MASK)), layer(x, BatchContext(MASK)), rtol=0, atol=1e-10)
    assert not list(merged.parameters())
    assert (HIDDEN, HIDDEN) not in {tuple(tensor.shape) for tensor in merged.state_dict().values()}


@pytest.mark.parametrize("merge", [False, True])
def test_records_one_distribution_per_text(merge: bool) -> None:
    torch.manual_seed(0)
    layer = SequenceFusion(AdapterBank(adapters()[:2], [1, 3], 5)).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, seen = texts().detach(), dict[str, Tensor]()
    slot_module = layer.merged() if merge else layer
    slot_module(x, BatchContext(MASK, record=seen.__setitem__, slot="4.feedforward"))
    weights = seen["4.feedforward"]
    assert weights.shape == (3, 4, 5) and not weights[..., [0, 2, 4]].any()
    _, expected = plain(layer, x, [0, 1])
    for token in range(4):
        torch.testing.assert_close(weights[:, token][:, [1, 3]], expected)


def test_padding_has_no_effect() -> None:
    layer, x = fusion().eval(), texts().detach()
    expected = layer(x, BatchContext(MASK))
    changed = x.clone()
    changed[MASK == 0] += 5.0
    found = layer(changed, BatchContext(MASK))
    real = MASK.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-12)
    assert not torch.allclose(found[~real], expected[~real])


@pytest.mark.parametrize("merge", [False, True])
def test_a_text_without_tokens_has_finite_output(merge: bool) -> None:
    layer, x = fusion().eval(), texts()
    slot_module = layer.merged() if merge else layer
    out = slot_module(x, BatchContext(torch.zeros_like(MASK)))
    assert out.isfinite().all()
    (gradient,) = torch.autograd.grad(out.sum(), [x])
    assert gradient.isfinite().all()


def test_has_the_parameters_of_a_fusion_and_equals_it_on_texts_of_one_token() -> None:
    layer = fusion()
    other = AdapterFusion(AdapterBank(adapters(), range(5), 5)).double()
    names = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert names == {name: tuple(p.shape) for name, p in other.named_parameters()}
    assert layer.undecayed == other.undecayed and set(layer.losses()) == {"value_penalty"}
    other.load_state_dict(layer.state_dict())
    x, mask = texts().detach().reshape(12, 1, HIDDEN), torch.ones(12, 1)
    torch.testing.assert_close(layer(x, BatchContext(mask)), other(x, BatchContext(mask)), rtol=0, atol=1e-12)

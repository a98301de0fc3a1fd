"""Gates against their equations in loops and float64: attention with learned keys, LoRA-Flow, and the mixture."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from fusion.layers.bank import AdapterBank
from fusion.layers.gates import AttentionGate, Gate, GatedMixture, LinearGate
from fusion.layers.slot_module import BatchContext
from tests.layers import test_sequence
from tests.layers.test_attention import HIDDEN, adapters, plain_output

TOTAL, POSITIONS = 4, [0, 1, 3]
Kind = TypeVar("Kind", bound=Gate)
MASK = test_sequence.MASK
PRIOR = [0.4, 0.1, 0.2, 0.1]


def initialized(gate: Kind) -> Kind:
    torch.manual_seed(2)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return gate.double()


def plain_attention(gate: AttentionGate, x: Tensor, on: list[int], prior: list[float]) -> Tensor:
    """The weights of one token x (D,): (total,)."""
    q = gate.query.weight @ x + gate.query.bias
    powers = {n: prior[n] * math.exp(float((q @ gate.keys[n]).detach()) / gate.temperature) for n in on}
    null = prior[TOTAL] if gate.null_source else 0.0
    weights = torch.zeros(TOTAL, dtype=x.dtype)
    for n, power in powers.items():
        weights[n] = power / (sum(powers.values()) + null)
    return weights


@pytest.mark.parametrize("per_text", [False, True])
@pytest.mark.parametrize("null_source", [False, True])
@pytest.mark.parametrize("prior", [None, PRIOR])
@pytest.mark.parametrize("on", [[0, 1, 2, 3], [1, 3]])
def test_attention_with_learned_keys(
    per_text: bool, null_source: bool, prior: list[float] | None, on: list[int]
) -> None:
    entries = None if prior is None else [*prior, *([0.2] if null_source else [])]
    gate = AttentionGate(
        None, HIDDEN, TOTAL, rank=3, per_text=per_text, temperature=1.5, null_source=null_source, prior=entries
    )
    gate = initialized(gate).eval()
    x, active = test_sequence.texts(), torch.tensor([n in on for n in range(TOTAL)])
    penalties: dict[str, Tensor] = {}
    context = BatchContext(MASK, sources_on=active, add_loss=penalties.__setitem__)
    found = gate(x, context)
    weights = [1.0] * (TOTAL + 1) if gate.log_prior is None else gate.log_prior.exp().tolist()  # of float32 logs
    for text in range(len(x)):
        tokens = x[text][MASK[text].bool()].mean(0, keepdim=True) if per_text else x[text]
        expected = torch.stack([plain_attention(gate, token, on, weights) for token in tokens])
        torch.testing.assert_close(found[text], expected, rtol=0, atol=1e-12)
    assert found.shape == (len(x), 1 if per_text else x.shape[1], TOTAL)
    assert set(penalties) == (set() if prior is None else {"prior_penalty"})
    each = torch.stack([active] * len(x))
    torch.testing.assert_close(gate(x, BatchContext(MASK, sources_on=each)), found, rtol=0, atol=0)


def test_the_penalty_is_the_divergence_from_the_prior_of_the_active_sources() -> None:
    gate = initialized(AttentionGate(None, HIDDEN, TOTAL, rank=3, prior=PRIOR))
    x, penalties = test_sequence.texts(), dict[str, Tensor]()
    on = torch.tensor([True, False, True, True])
    p = gate(x, BatchContext(MASK, sources_on=on, add_loss=penalties.__setitem__))
    prior = torch.tensor([0.4, 0.2, 0.1], dtype=x.dtype) / 0.7
    kept = p[..., on]
    each = (kept * (kept / prior).log()).sum(-1)
    expected = torch.stack([row[mask.bool()].mean() for row, mask in zip(each, MASK, strict=True)])
    torch.testing.assert_close(penalties["prior_penalty"], expected, rtol=0, atol=1e-7)


def test_initially_the_weights_are_uniform_or_the_prior() -> None:
    x = test_sequence.texts().float()
    torch.testing.assert_close(
        AttentionGate(None, HIDDEN, TOTAL)(x, BatchContext(MASK)), torch.full((*x.shape[:2], TOTAL), 1 / TOTAL)
    )
    torch.testing.assert_close(
        LinearGate(None, HIDDEN, TOTAL)(x, BatchContext(MASK)), torch.full((*x.shape[:2], TOTAL), 1 / TOTAL)
    )
    found = AttentionGate(None, HIDDEN, TOTAL, null_source=True, prior=[*PRIOR, 0.2])(x, BatchContext(MASK))
    torch.testing.assert_close(found, torch.tensor(PRIOR).expand_as(found))


@pytest.mark.parametrize("on", [None, [1, 3]])
def test_the_gate_of_lora_flow(on: list[int] | None) -> None:
    gate = initialized(LinearGate(None, HIDDEN, TOTAL))
    x, kept = test_sequence.texts(), on or list(range(TOTAL))
    active = None if on is None else torch.tensor([n in on for n in range(TOTAL)])
    found = gate(x, BatchContext(MASK, sources_on=active))
    for text in range(len(x)):
        for token in range(x.shape[1]):
            powers = {n: torch.exp(gate.weight[n] @ x[text, token]) for n in kept}
            total = sum(powers.values())
            for n in range(TOTAL):
                expected = powers[n] / total + gate.bias[n] if n in kept else torch.zeros_like(x[0, 0, 0])
                torch.testing.assert_close(found[text, token, n], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", [None, ("decoder", 3)])
@pytest.mark.parametrize("value_matrix", [False, True])
def test_the_mixture(place: tuple[str, int] | None, value_matrix: bool) -> None:
    """The gate is evaluated on the slot's input, or was evaluated on the layer's; absent sources have no update."""
    gate = initialized(AttentionGate(place, HIDDEN, TOTAL, rank=3))
    bank = AdapterBank(adapters()[:3], POSITIONS, TOTAL)
    module = GatedMixture(bank, gate, value_matrix).double()
    x, seen = test_sequence.texts(), dict[str, Tensor]()
    of_layer = x if place is None else x.roll(1, 0)
    context = BatchContext(MASK, record=seen.__setitem__, slot="a")
    if place is not None:
        with pytest.raises(KeyError, match=r"decoder\.3"):
            module(x, context)
        context.gates["decoder.3"] = gate(of_layer, context)
    found, p = module(x, context), gate(of_layer, context)
    for text in range(len(x)):
        for token in range(x.shape[1]):
            updates = [plain_output(adapter, x[text, token]) for adapter in adapters()[:3]]
            mixed = sum(p[text, token, n] * update for n, update in zip(POSITIONS, updates, strict=True))
            expected = mixed if module.value is None else module.value.weight @ mixed
            torch.testing.assert_close(found[text, token], expected, rtol=0, atol=1e-10)
    assert seen["a"].shape == (*x.shape[:2], TOTAL) and not seen["a"][..., 2].any()
    torch.testing.assert_close(seen["a"][..., POSITIONS], p[..., POSITIONS], rtol=0, atol=0)
    assert set(module.losses()) == ({"value_penalty"} if value_matrix else set())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0: expected at least 1"),
        ({"prior": [0.5, 0.5]}, r"prior \[0.5, 0.5\]: expected 4 numbers"),
        ({"prior": PRIOR, "null_source": True}, r"prior .*: expected 5 numbers"),
    ],
)
def test_invalid_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionGate(None, HIDDEN, TOTAL, **settings)

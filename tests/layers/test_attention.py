"""The folded fusion against the paper's equation, written out with loops and einsum in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fusion.layers.attention import AdapterFusion, SequenceFusion, masked_softmax
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.slot_module import BatchContext

HIDDEN = 12
SHAPES = [(3, "relu", 1.0), (5, "gelu", 4.0), (5, "gelu", 1.0), (1, "silu", 0.5), (4, "tanh", 1.0)]


def adapters() -> list[BottleneckAdapter]:
    made = []
    for seed, (size, nonlinearity, scaling) in enumerate(SHAPES):
        torch.manual_seed(seed)
        adapter = BottleneckAdapter(HIDDEN, size, nonlinearity, scaling).double()
        for parameter in adapter.parameters():  # biases too, which start at zero
            torch.nn.init.normal_(parameter, std=0.7)
        made.append(adapter)
    return made


def fusion(**options: float | None) -> AdapterFusion:
    torch.manual_seed(100)
    layer = AdapterFusion(AdapterBank(adapters(), range(5), 5), **options).double()  # type: ignore[arg-type]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def context(x: Tensor, **more: Tensor) -> BatchContext:
    return BatchContext(attention_mask=torch.ones(x.shape[:2], dtype=torch.long), **more)  # type: ignore[arg-type]


def plain_output(adapter: BottleneckAdapter, x: Tensor) -> Tensor:
    """u_n for one token: x (D,) -> (D,), from the weights alone."""
    act = {
        "identity": lambda a: a,
        "relu": lambda a: a.clamp(min=0),
        "gelu": lambda a: a * 0.5 * (1 + torch.erf(a / 2**0.5)),
        "silu": lambda a: a / (1 + torch.exp(-a)),
        "tanh": lambda a: (torch.exp(2 * a) - 1) / (torch.exp(2 * a) + 1),
    }[adapter.nonlinearity]
    down_bias, up_bias = (0.0 if part.bias is None else part.bias for part in (adapter.down, adapter.up))
    z = act(torch.einsum("rd,d->r", adapter.down.weight, x) + down_bias)
    return adapter.scaling * (torch.einsum("dr,r->d", adapter.up.weight, z) + up_bias)


def plain_fusion(layer: AdapterFusion, x: Tensor, sources: list[BottleneckAdapter], noise: Tensor) -> Tensor:
    """Token by token and source by source; `noise` (B, T, N) multiplies the scores, as dropout does."""
    rows = []
    for b in range(x.shape[0]):
        tokens = []
        for t in range(x.shape[1]):
            outputs = [plain_output(adapter, x[b, t]) for adapter in sources]
            q = torch.einsum("ed,d->e", layer.query.weight, x[b, t]) + layer.query.bias
            scores = []
            for n, u in enumerate(outputs):
                k = torch.einsum("ed,d->e", layer.key.weight, u) + layer.key.bias
                scores.append(torch.dot(q, k) * noise[b, t, n] / layer.temperature)
            weights = [torch.exp(s) / sum(torch.exp(o) for o in scores) for s in scores]
            values = [u if layer.value is None else torch.einsum("ed,d->e", layer.value.weight, u) for u in outputs]
            tokens.append(torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(0))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@pytest.mark.parametrize("value_matrix", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("mode", ["evaluation", "training", "training with dropout"])
@pytest.mark.parametrize("tokens", [4, 9])  # of 2 rows: fewer in all than the hidden size, and more
@pytest.mark.parametrize("rank", [None, 1, 5, 11, 20])
def test_folded_equals_plain(value_matrix: bool, temperature: float, mode: str, tokens: int, rank: int | None) -> None:
    dropout = 0.4 if mode == "training with dropout" else 0.0
    layer = fusion(value_matrix=value_matrix, temperature=temperature, dropout=dropout, rank=rank)
    layer.train(mode != "evaluation")
    torch.manual_seed(7)
    x = torch.randn(2, tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    noise = torch.ones(2, tokens, 5, dtype=torch.float64)
    if dropout:
        torch.manual_seed(8)
        noise = torch.nn.functional.dropout(noise, dropout)
        assert (noise == 0).any() and (noise > 1).any()
    torch.manual_seed(8)
    folded = layer(x, context(x))
    plain = plain_fusion(layer, x, adapters(), noise)
    torch.testing.assert_close(folded, plain, rtol=0, atol=1e-10)

    direction = torch.randn_like(folded)
    wanted = dict(layer.named_parameters()) | {"x": x}
    if mode == "evaluation":
        del wanted["key.bias"]  # the softmax drops it there, and so does the layer
    folded_gradients = torch.autograd.grad((folded * direction).sum(), list(wanted.values()))
    plain_gradients = torch.autograd.grad((plain * direction).sum(), list(wanted.values()))
    for name, one, two in zip(wanted, folded_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10, msg=f"the gradients of {name} differ")


def sources_of(kinds: list[str], width: int, output: int) -> list[BottleneckAdapter]:
    torch.manual_seed(11)
    made = []
    for number, kind in enumerate(kinds):
        lora = {"nonlinearity": "identity", "scaling": 2.0 / (number + 1), "bias": False}
        options = lora if kind == "lora" else {"nonlinearity": "silu"}
        made.append(BottleneckAdapter(width, 2 + number, output_size=output, **options).double())
        for parameter in made[-1].parameters():
            torch.nn.init.normal_(parameter, std=0.7)
    return made


@pytest.mark.parametrize("kinds", [["lora"] * 3, ["bottleneck", "lora", "bottleneck"]], ids=["lora", "both"])
@pytest.mark.parametrize(("width", "output"), [(12, 12), (12, 7), (5, 16)])
@pytest.mark.parametrize(("rank", "value_matrix"), [(None, True), (3, False)])
@pytest.mark.parametrize("tokens", [3, 15])
def test_lora_and_linear_outputs_use_the_same_path(
    kinds: list[str], width: int, output: int, rank: int | None, value_matrix: bool, tokens: int
) -> None:
    sources = sources_of(kinds, width, output)
    layer = AdapterFusion(AdapterBank(sources, range(3), 3), rank=rank, value_matrix=value_matrix).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, tokens, width, dtype=torch.float64, requires_grad=True)
    plain = plain_fusion(layer, x, sources, torch.ones(2, tokens, 3, dtype=torch.float64))
    folded = layer(x, context(x))
    assert folded.shape == (2, tokens, output)
    torch.testing.assert_close(folded, plain, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.eval().merged()(x, context(x)), plain, rtol=0, atol=1e-10)
    direction = torch.randn_like(plain)
    wanted = [*layer.train().parameters(), x]
    for one, two in zip(
        torch.autograd.grad((layer(x, context(x)) * direction).sum(), wanted),
        torch.autograd.grad((plain * direction).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


def test_a_rank_only_reduces_query_and_key() -> None:
    layer = fusion(rank=3)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "query.weight": (3, HIDDEN),
        "query.bias": (3,),
        "key.weight": (3, HIDDEN),
        "key.bias": (3,),
        "value.weight": (HIDDEN, HIDDEN),
    }
    for rank in (0, -1):
        with pytest.raises(ValueError, match=f"rank {rank}: expected at least 1"):
            fusion(rank=rank)


@pytest.mark.parametrize("tokens", [3, 9])
def test_every_parameter_gets_a_gradient_in_training(tokens: int) -> None:
    layer = fusion().train()
    x = torch.randn(2, tokens, HIDDEN, dtype=torch.float64)
    layer(x, context(x)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {
        "query.weight",
        "query.bias",
        "key.weight",
        "key.bias",
        "value.weight",
    }


def test_trains_exactly_the_parameters_of_the_paper() -> None:
    names = {name for name, _ in fusion(value_matrix=False).named_parameters()}
    assert names == {"query.weight", "query.bias", "key.weight", "key.bias"}


def test_initial_values() -> None:
    torch.manual_seed(0)
    layer = AdapterFusion(AdapterBank([BottleneckAdapter(64, 4)], [0], 1))
    assert layer.value is not None
    value = layer.value.weight
    assert torch.equal(value.diagonal(), torch.ones(64))
    off = value[~torch.eye(64, dtype=torch.bool)]
    assert torch.equal(off, torch.full_like(off, 1e-6))
    assert layer.query.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not layer.query.bias.any() and not layer.key.bias.any()


def test_penalty_is_the_squared_distance_from_the_identity() -> None:
    layer = fusion()
    assert layer.value is not None
    expected = sum((layer.value.weight[i, j].item() - (i == j)) ** 2 for i in range(HIDDEN) for j in range(HIDDEN))
    assert set(layer.losses()) == {"value_penalty"}
    assert layer.losses()["value_penalty"].item() == pytest.approx(expected, rel=1e-12)
    assert fusion(value_matrix=False).losses() == {}


def test_one_source_passes_through_unchanged() -> None:
    adapter = adapters()[0]
    layer = AdapterFusion(AdapterBank([adapter], [0], 1), value_matrix=False).double()
    x = torch.randn(2, 3, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(layer(x, context(x)), adapter(x, context(x)), rtol=0, atol=1e-12)


def test_a_masked_source_has_no_effect() -> None:
    layer, x = fusion().eval(), torch.randn(1, 3, HIDDEN, dtype=torch.float64)
    on = torch.tensor([True, False, True, True, False])
    kept = [a for a, keep in zip(adapters(), on.tolist(), strict=True) if keep]
    expected = plain_fusion(layer, x, kept, torch.ones(1, 3, 3, dtype=torch.float64))
    torch.testing.assert_close(layer(x, context(x, sources_on=on)), expected, rtol=0, atol=1e-10)
    none = layer(x, context(x, sources_on=torch.zeros(5, dtype=torch.bool)))
    assert torch.equal(none, torch.zeros_like(none))


def test_records_a_distribution_over_all_sources() -> None:
    here = adapters()[:2]
    layer = AdapterFusion(AdapterBank(here, [1, 3], 5)).double().eval()
    x = torch.randn(2, 3, HIDDEN, dtype=torch.float64)
    recorded: dict[str, Tensor] = {}
    layer(x, BatchContext(torch.ones(2, 3), record=recorded.__setitem__, slot="4.feedforward"))
    weights = recorded["4.feedforward"]
    assert weights.shape == (2, 3, 5)
    assert not weights[..., [0, 2, 4]].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, dtype=torch.float64))


def test_masked_softmax_without_a_mask_is_a_softmax() -> None:
    scores = torch.randn(3, 4)
    torch.testing.assert_close(masked_softmax(scores, None), scores.exp() / scores.exp().sum(-1, keepdim=True))


@pytest.mark.parametrize("value_matrix", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("on", [None, [True, False, True, True, False], [False] * 5])
@pytest.mark.parametrize("rank", [None, 3])
def test_merged_equals_folded(value_matrix: bool, temperature: float, on: list[bool] | None, rank: int | None) -> None:
    layer = fusion(value_matrix=value_matrix, temperature=temperature, rank=rank).eval()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    merged = layer.merged()
    x = torch.randn(2, 4, HIDDEN, dtype=torch.float64)
    masked = context(x, sources_on=torch.tensor(on)) if on else context(x)
    torch.testing.assert_close(merged(x, masked), layer(x, masked), rtol=0, atol=1e-10)
    assert not list(merged.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_merged_in_single_precision_and_without_a_square_matrix() -> None:
    torch.manual_seed(0)
    hidden, count, size = 64, 14, 4
    adapters = [BottleneckAdapter(hidden, size) for _ in range(count)]
    for adapter in adapters:
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    layer = AdapterFusion(AdapterBank(adapters, range(count), count)).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, merged = torch.randn(2, 9, hidden), layer.merged()
    torch.testing.assert_close(merged(x, context(x)), layer(x, context(x)), rtol=1e-5, atol=1e-5)
    assert (hidden, hidden) not in {tuple(tensor.shape) for tensor in merged.state_dict().values()}


def test_merged_records_what_folded_records() -> None:
    layer = AdapterFusion(AdapterBank(adapters()[:2], [1, 3], 5)).double().eval()
    x = torch.randn(2, 3, HIDDEN, dtype=torch.float64)
    recorded: list[Tensor] = []
    for slot_module in (layer, layer.merged()):
        slot_module(x, BatchContext(torch.ones(2, 3), record=lambda _, p: recorded.append(p)))
    assert recorded[1].shape == (2, 3, 5)
    torch.testing.assert_close(recorded[1], recorded[0], rtol=0, atol=1e-12)


PRIOR = [0.4, 0.1, 0.2, 0.05, 0.25]


def plain_distribution(layer: AdapterFusion, x: Tensor, prior: list[float], on: list[int]) -> list[Tensor]:
    """p_n of one token x (D,) for the sources `on`, and last for the null source if the layer has one."""
    q = layer.query.weight @ x + layer.query.bias
    powers = []
    for n in on:
        k = layer.key.weight @ plain_output(adapters()[n], x) + layer.key.bias
        powers.append(prior[n] * torch.exp(torch.dot(q, k) / layer.temperature))
    if layer.null_source:
        powers.append(prior[-1] * torch.exp(torch.dot(q, layer.key.bias) / layer.temperature))
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("prior", [None, PRIOR])
@pytest.mark.parametrize("null_source", [True, False])
@pytest.mark.parametrize("on", [[0, 1, 2, 3, 4], [1, 3]])
@pytest.mark.parametrize("training", [True, False])
def test_prior_and_null_source(prior: list[float] | None, null_source: bool, on: list[int], training: bool) -> None:
    entries = None if prior is None else [*prior, *([0.3] if null_source else [])]
    torch.manual_seed(100)
    bank = AdapterBank(adapters(), range(5), 5)
    layer = AdapterFusion(bank, temperature=1.5, null_source=null_source, prior=entries).double().train(training)
    assert bool(layer.query.weight.any()) == (prior is None)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 3, HIDDEN, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    seen: dict[str, Tensor] = {}
    recorded: dict[str, Tensor] = {}
    sources_on = torch.tensor([n in on for n in range(5)])
    batch = BatchContext(mask, sources_on=sources_on, record=recorded.__setitem__, add_loss=seen.__setitem__, slot="s")
    found = layer(x, batch)
    weights = entries or [1.0] * (5 + null_source)
    active = torch.tensor([weights[n] for n in on] + ([weights[-1]] if null_source else []), dtype=torch.float64)
    pi = active / active.sum()
    assert layer.value is not None
    outputs, divergences = [], []
    for b in range(2):
        of_text = []
        for t in range(3):
            p = plain_distribution(layer, x[b, t], weights, on)
            values = [
                w * layer.value.weight @ plain_output(adapters()[n], x[b, t]) for w, n in zip(p, on, strict=False)
            ]
            outputs.append(torch.stack(values).sum(0))
            of_text.append(torch.stack([one * torch.log(one / other) for one, other in zip(p, pi, strict=True)]).sum())
            torch.testing.assert_close(recorded["s"][b, t, on], torch.stack(p[: len(on)]), rtol=0, atol=1e-7)
        divergences.append(torch.stack(of_text)[mask[b].bool()].mean())
    expected = torch.stack(outputs).view(2, 3, HIDDEN)
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-6)  # the prior is float32
    close(found, expected)
    if prior is None:
        assert seen == {}
        total, other = found.sum(), expected.sum()
    else:
        assert list(seen) == ["prior_penalty"]
        close(seen["prior_penalty"], torch.stack(divergences))
        total, other = found.sum() + seen["prior_penalty"].sum(), expected.sum() + torch.stack(divergences).sum()
    wanted = [x, *(p for name, p in layer.named_parameters() if name != "key.bias")]
    for one, two in zip(torch.autograd.grad(total, wanted), torch.autograd.grad(other, wanted), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    merged = layer.eval().merged()(x, BatchContext(mask, sources_on=sources_on))
    close(merged, expected)


@pytest.mark.parametrize("kind", [AdapterFusion, SequenceFusion])
def test_the_attention_starts_at_the_prior(kind: type[AdapterFusion]) -> None:
    layer = kind(AdapterBank(adapters()[:2], [1, 3], 5), null_source=True, prior=[*PRIOR, 0.3]).double()
    seen: dict[str, Tensor] = {}
    divergence: dict[str, Tensor] = {}
    batch = BatchContext(torch.ones(2, 3), record=seen.__setitem__, add_loss=divergence.__setitem__, slot="s")
    layer(torch.randn(2, 3, HIDDEN, dtype=torch.float64), batch)
    expected = torch.tensor([0.0, 0.1, 0.0, 0.05, 0.0], dtype=torch.float64) / (0.1 + 0.05 + 0.3)
    torch.testing.assert_close(seen["s"], expected.expand(2, 3, 5), rtol=0, atol=1e-7)
    assert divergence["prior_penalty"].shape == (2,)
    torch.testing.assert_close(divergence["prior_penalty"], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("prior", [PRIOR[:4], [*PRIOR, 0.3], [0.0, *PRIOR[1:]]])
def test_priors_that_do_not_fit_are_refused(prior: list[float]) -> None:
    with pytest.raises(ValueError, match="expected 5 positive numbers"):
        AdapterFusion(AdapterBank(adapters(), range(5), 5), prior=prior)

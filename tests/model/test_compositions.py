"""The table of compositions: each entry against its equation, in loops and float64, and no other module compares names."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion.cli.config_sources import keys_of
from fusion.config.compositions import COMPOSITIONS, CompositionConfig, SlotSources
from fusion.config.fields import default_of
from fusion.config.methods import METHODS, MethodConfig
from fusion.config.stages import Stage1Config, Stage2Config
from fusion.errors import UserError
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.gates import Gate
from fusion.layers.slot_module import BatchContext, SlotModule
from fusion.runs.identity import ADDED_LATER
from tests.layers import test_scalearn, test_sequence
from tests.layers.test_attention import HIDDEN, adapters, plain_fusion, plain_output

TOTAL = 5
POSITIONS = (0, 2, 3)  # of the sources that have an adapter in the slot
MASK = test_sequence.MASK
NEEDED: dict[str, dict[str, Any]] = {"pruned": {"fusion": "a", "keep": 1}}
"""Settings that a composition cannot be without."""

Sources = Mapping[int, BottleneckAdapter]


def plain_tokens(x: Tensor, of_token: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([torch.stack([of_token(x[b, t]) for t in range(x.shape[1])]) for b in range(len(x))])


def plain_attention(module: Any, x: Tensor, sources: Sources, on: Collection[int]) -> Tensor:
    kept = [adapter for n, adapter in sources.items() if n in on]
    return plain_fusion(module, x, kept, torch.ones(*x.shape[:2], len(kept), dtype=x.dtype))


def plain_sequence(module: Any, x: Tensor, sources: Sources, on: Collection[int]) -> Tensor:
    return test_sequence.plain(module, x, [n for n in sources if n in on])[0]


def plain_static(module: Any, x: Tensor, sources: Sources, on: Collection[int]) -> Tensor:
    powers = {n: torch.exp(w) for n, w in zip(sources, module.weight, strict=True) if n in on}
    total = sum(powers.values())
    return plain_tokens(
        x, lambda token: torch.stack([p / total * plain_output(sources[n], token) for n, p in powers.items()]).sum(0)
    )


def plain_mean(module: Any, x: Tensor, sources: Sources, on: Collection[int]) -> Tensor:
    kept = [adapter for n, adapter in sources.items() if n in on]
    return plain_tokens(x, lambda token: torch.stack([plain_output(a, token) for a in kept]).sum(0) / len(kept))


def plain_scales(module: Any, x: Tensor, sources: Sources, on: Collection[int]) -> Tensor:
    rows = {n: module.scales[n if module.shared else place] for place, n in enumerate(sources) if n in on}
    return test_scalearn.plain(torch.stack([*rows.values()]), [sources[n] for n in rows], x)


def plain_average(module: Any, x: Tensor, sources: Sources, on: Collection[int]) -> Tensor:
    first = next(iter(sources.values()))
    one = BottleneckAdapter(HIDDEN, first.down.out_features, "tanh", 2.0).double()
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            parameter.copy_(torch.stack([a.get_parameter(name) for a in sources.values()]).mean(0))
    return plain_tokens(x, lambda token: plain_output(one, token))


def plain_source(module: Any, x: Tensor, sources: Sources, on: Collection[int]) -> Tensor:
    return plain_tokens(x, lambda token: plain_output(module, token))


def plain_flow(module: Any, x: Tensor, sources: Sources, on: Collection[int]) -> Tensor:
    def of_token(token: Tensor) -> Tensor:
        powers = {n: torch.exp(module.gate.weight[n] @ token) for n in on}  # also of sources without an adapter here
        weights = {n: power / sum(powers.values()) + module.gate.bias[n] for n, power in powers.items()}
        return torch.stack([weights[n] * plain_output(a, token) for n, a in sources.items() if n in on]).sum(0)

    return plain_tokens(x, of_token)


def plain_arrow(module: Any, x: Tensor, sources: Sources, on: Collection[int]) -> Tensor:
    kept = [adapter for n, adapter in sources.items() if n in on]

    def of_token(token: Tensor) -> Tensor:
        scores = []
        for adapter in kept:
            direction = torch.linalg.svd(adapter.scaling * adapter.up.weight @ adapter.down.weight).Vh[0]
            scores.append((direction @ token).abs().exp())
        return torch.stack([s / sum(scores) * plain_output(a, token) for s, a in zip(scores, kept, strict=True)]).sum(0)

    return plain_tokens(x, of_token)


REFERENCES: dict[str, Callable[[Any, Tensor, Sources, Collection[int]], Tensor]] = {
    "adapterfusion": plain_attention,
    "sequence": plain_sequence,
    "lora_flow": plain_flow,
    "arrow": plain_arrow,
    "static": plain_static,
    "mean": plain_mean,
    "scalearn": plain_scales,
    "scalearn_uniform": plain_scales,
    "scalearn_pp": plain_scales,
    "scalearn_uniform_pp": plain_scales,
    "cat": plain_scales,
    "average": plain_average,
    "pruned": plain_attention,
    "continued": plain_source,
}
"""Of each composition, the output for x (B, T, D), one token after the other, where the sources `on` take part.

It gets the module, for its parameters, and the slot's adapters by the position of their source.
"""


def sources_of(name: str) -> dict[int, BottleneckAdapter]:
    every = adapters()
    if COMPOSITIONS[name].one_shape:
        every = [BottleneckAdapter(HIDDEN, 3, "tanh", 2.0).double() for _ in range(TOTAL)]
    positions = POSITIONS[:1] if COMPOSITIONS[name].finds == "continued" else POSITIONS
    return {n: every[n] for n in positions}


def built(name: str, shared: Any = None) -> tuple[SlotModule, dict[int, BottleneckAdapter]]:
    definition, sources = COMPOSITIONS[name], sources_of(name)
    settings = CompositionConfig(name, **NEEDED.get(name, {}))
    module = definition.build(settings, SlotSources(sources, TOTAL), shared).double()
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module, sources


def share_of(name: str) -> Any:
    share = COMPOSITIONS[name].share
    settings = CompositionConfig(name, **NEEDED.get(name, {}))
    return None if share is None else share(settings, SlotSources(sources_of(name), TOTAL, hidden_size=HIDDEN))


def context(module: SlotModule, x: Tensor, **values: Any) -> BatchContext:
    """The context of a batch, with the weights of the module's gate, if any, computed from x."""
    of_batch = BatchContext(MASK, **values)
    for gate in module.modules():
        if isinstance(gate, Gate):
            of_batch.gates[gate.key] = gate(x, of_batch)
    return of_batch


@pytest.mark.parametrize("off", [None, 2])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_composition_computes_its_equation(name: str, off: int | None) -> None:
    assert name in REFERENCES, f"write {name}'s equation out in loops, in REFERENCES"
    module, sources = built(name, share_of(name))
    x = test_sequence.texts()
    on = [n for n in range(TOTAL) if n != off]
    sources_on = None if off is None else torch.tensor([n in on for n in range(TOTAL)])
    found = module(x, context(module, x, sources_on=sources_on))
    expected = REFERENCES[name](module, x, sources, on)
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    direction = torch.randn_like(found)
    wanted = [x, *module.parameters()]
    one = torch.autograd.grad((found * direction).sum(), wanted, allow_unused=True)
    two = torch.autograd.grad((expected * direction).sum(), wanted, allow_unused=True)
    for here, there in zip(one, two, strict=True):
        zero = torch.zeros((), dtype=x.dtype)
        pair = zero if here is None else here, zero if there is None else there
        torch.testing.assert_close(*pair, rtol=0, atol=1e-10)
    merged = module.eval().merged()(x, context(module, x, sources_on=sources_on))
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name, one in COMPOSITIONS.items() if "cross_fit" in one.settings])
def test_each_text_has_its_own_sources_and_fold(name: str) -> None:
    """In training, the sources that are active and the adapters of the own source may differ between texts."""
    sources, x = sources_of(name), test_sequence.texts()
    own, of_folds = 2, [adapters()[4], adapters()[1]]
    slot = SlotSources(sources, TOTAL, own=(own,), folds={own: of_folds})
    shared = share_of(name)
    module = COMPOSITIONS[name].build(CompositionConfig(name, **NEEDED.get(name, {})), slot, shared).double().train()
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    alone = COMPOSITIONS[name].build(
        CompositionConfig(name, **NEEDED.get(name, {})), SlotSources(sources, TOTAL), shared
    )
    assert [p.shape for p in module.parameters()] == [p.shape for p in alone.parameters()]
    active = [[0, 2, 3], [2, 3], [0, 2]]
    on = torch.tensor([[n in every for n in range(TOTAL)] for every in active])
    seen: dict[str, Tensor] = {}
    for folds in ([1, 0, -1], None):
        chosen = None if folds is None else torch.tensor(folds)
        of_batch = context(module, x, sources_on=on, folds=chosen, record=seen.__setitem__, slot="0.feedforward")
        found = module(x, of_batch)
        for text in range(3):
            fold = -1 if folds is None else folds[text]
            main = sources if fold < 0 else {**sources, own: of_folds[fold]}
            part = test_sequence.MASK[text : text + 1]
            module_of = REFERENCES[name]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(test_sequence, "MASK", part)
                patch.setattr(test_sequence, "adapters", lambda main=main: [main.get(n) for n in range(TOTAL)])
                expected = module_of(module, x[text : text + 1], main, active[text])
            torch.testing.assert_close(found[text : text + 1], expected, rtol=0, atol=1e-10)
            weighed = seen["0.feedforward"][text].ne(0).any(0).tolist()
            assert [n for n in range(TOTAL) if weighed[n]] == active[text]
    wanted = [x, *module.parameters()]
    none = context(module, x, sources_on=torch.zeros_like(on), folds=chosen)
    for gradient in torch.autograd.grad(module(x, none).sum(), wanted, allow_unused=True):
        assert gradient is None or (gradient.isfinite().all() and not gradient.any())


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_weights_of_the_sources_are_reported_as_declared(name: str) -> None:
    module, sources = built(name, share_of(name))
    seen: dict[str, Tensor] = {}
    x = test_sequence.texts()
    module(x, context(module, x, record=seen.__setitem__, slot="0.feedforward"))
    if COMPOSITIONS[name].no_weights:
        assert seen == {}
        return
    assert seen["0.feedforward"].shape == (*MASK.shape, TOTAL)
    elsewhere = [n for n in range(TOTAL) if n not in sources]
    weighed = seen["0.feedforward"].flatten(0, 1).any(0)  # of any token
    assert not weighed[elsewhere].any() and weighed[list(sources)].all()


def test_layers_share_one_parameter() -> None:
    sharing = []
    for name in COMPOSITIONS:
        shared = share_of(name)
        (one, _), (two, _) = built(name, shared), built(name, shared)
        same = [p is q for p, q in zip(one.parameters(), two.parameters(), strict=True)]
        if isinstance(shared, nn.Parameter | Gate):
            assert all(same)
            sharing.append(name)
        else:
            assert not any(same)
    assert sharing == ["lora_flow", "scalearn_pp", "scalearn_uniform_pp", "cat"]


def test_an_unknown_composition_is_refused() -> None:
    with pytest.raises(UserError, match=r"composition=scalern: expected one of adapterfusion, sequence, "):
        CompositionConfig("scalern")
    with pytest.raises(UserError, match=r"method=adaptor: expected one of adapter, head, lora, "):
        MethodConfig("adaptor")


# --- settings ---------------------------------------------------------------------------------------


def test_the_flat_groups_have_the_keys_of_version_0_1_in_their_order() -> None:
    assert [f.name for f in fields(CompositionConfig)][:12] == [
        *("name", "value_matrix", "temperature", "dropout", "value_penalty", "layers", "drop", "rank"),
        *("target_adapter", "train", "fusion", "keep"),
    ]
    assert [f.name for f in fields(MethodConfig)][:6] == [
        *("name", "rank", "alpha", "dropout", "temperature", "targets")
    ]
    assert list(CompositionConfig("mean").as_stored().items()) == [
        *(("name", "mean"), ("value_matrix", True), ("temperature", 1.0), ("dropout", 0.0)),
        *(("value_penalty", 0.01), ("layers", None)),
    ]
    assert list(MethodConfig("bitfit").as_stored().items()) == [
        *(("name", "bitfit"), ("rank", 8), ("alpha", 8), ("dropout", 0.0), ("temperature", 2.0)),
        ("targets", ["query", "value"]),
    ]


def test_new_settings_at_their_defaults_keep_the_identity_of_version_0_1() -> None:
    later = {key: value for key, value in ADDED_LATER.items() if key.startswith(("composition.", "method."))}
    assert (
        later.items()
        >= {
            **{"composition.drop": None, "composition.rank": None, "composition.target_adapter": False},
            **{"composition.train": False, "composition.fusion": None, "composition.keep": None},
            **{"method.rank": 8, "method.alpha": 8, "method.dropout": 0.0, "method.temperature": 2.0},
        }.items()
    )
    assert later["method.targets"] == ["query", "value"]


def test_keys_are_the_fields_and_nothing_else() -> None:
    for group, config in (("composition", CompositionConfig), ("method", MethodConfig)):
        keys = {key for schema in (Stage1Config, Stage2Config) for key in keys_of(schema)}
        assert {key for key in keys if key.startswith(f"{group}.")} == {f"{group}.{f.name}" for f in fields(config)}


OTHER = {
    **{"prior": "own", "dropped": "own", "cross_fit": 2, "prior_own": 0.25},
    **{"gate": "layer", "merge": "ties", "density": 0.25},
}
WITH: dict[str, dict[str, Any]] = {  # settings without which another has no effect
    "prior_own": {"prior": "own"},
    "prior_penalty": {"prior": "uniform"},
    "dropped": {"source_dropout": 0.5},
    "density": {"merge": "ties"},
}


def other_than(default: Any) -> Any:
    if isinstance(default, bool):
        return not default
    if isinstance(default, list):
        return ["x"]
    return 1 if default is None else default + (0.5 if isinstance(default, float) else 1)


@pytest.mark.parametrize(("table", "config"), [(COMPOSITIONS, CompositionConfig), (METHODS, MethodConfig)])
def test_each_name_has_settings_that_are_fields_and_refuses_the_others(table: Any, config: Any) -> None:
    own = [f for f in fields(config) if f.name not in config.common]
    for name, entry in table.items():
        assert set(entry.settings) <= {f.name for f in own}
        assert set(getattr(entry, "shaping", ())) <= set(entry.settings)
        assert set(getattr(entry, "loss_terms", ())) <= set(entry.settings)
        for f in own:
            value = OTHER[f.name] if f.name in OTHER else other_than(default_of(f))
            if f.name in entry.settings:
                assert getattr(config(name, **{f.name: value}, **WITH.get(f.name, {})), f.name) == value
                continue
            with pytest.raises(UserError) as error:
                config(name, **{f.name: value})
            having = [other for other, one in table.items() if f.name in one.settings]
            assert str(error.value).startswith(f"{config.group}.{f.name}=")
            assert f"{config.group}={name} has no such setting" in str(error.value)
            assert str(error.value).endswith(f"{config.group}={' or '.join(having)}")
    assert config().is_default and not config(next(reversed(table))).is_default


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior_own": 0.9}, "composition.prior_own=0.9: has no effect without composition.prior=own; leave it out"),
        ({"prior_own": 0.9, "prior": "uniform"}, "composition.prior_own=0.9: has no effect"),
        ({"prior_penalty": 0.1}, "has no effect without composition.prior=uniform or own; leave it out"),
        ({"dropped": "own"}, "composition.dropped=own: has no effect without composition.source_dropout=0.5"),
        ({"name": "average", "density": 0.1}, "has no effect without composition.merge=ties or dare; leave it out"),
        ({"gate": "head"}, "composition.gate=head: expected one of slot, layer, model, or null for slot, or layer for"),
        ({"prior": "mine"}, "composition.prior=mine: expected one of uniform, own, or null for none"),
        ({"source_dropout": 1.0}, "composition.source_dropout=1.0: expected a finite number >= 0 and < 1"),
        ({"cross_fit": 1}, "composition.cross_fit=1: expected a whole number >= 2, or null for the own adapter itself"),
    ],
)
def test_settings_without_an_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        CompositionConfig(**settings)
    assert message in str(error.value)


def test_the_prior_over_the_sources() -> None:
    sources = SlotSources({}, 4, own=(1,))
    assert CompositionConfig().prior_over(sources) is None
    assert CompositionConfig(prior="uniform").prior_over(sources) == [0.25] * 4
    own = CompositionConfig(prior="own", prior_own=0.7)
    assert own.prior_over(sources) == pytest.approx([0.1, 0.7, 0.1, 0.1])
    assert own.prior_over(SlotSources({}, 2, own=(0, 1))) == [0.5, 0.5]
    null = CompositionConfig(prior="own", prior_own=0.7, null_source=True)
    assert null.prior_over(sources) == pytest.approx([0.075, 0.7, 0.075, 0.075, 0.075])
    assert null.prior_over(SlotSources({}, 1, own=(0,))) == pytest.approx([0.7, 0.3])


# --- no other module compares a name ----------------------------------------------------------------

ROOT = Path(__file__).parents[2]
TABLES = ("fusion/config/compositions.py", "fusion/config/methods.py")
NAMES = {*COMPOSITIONS, *METHODS}


def comparisons(source: str) -> Iterator[str]:
    """What `source` compares with names of the tables: `config.name == "mean"`, `name.startswith("scalearn")`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr not in ("startswith", "endswith", "removeprefix", "removesuffix"):
                continue
            sides = [node.func.value, *node.args]
        elif isinstance(node, ast.Match):
            sides = [node.subject, *(c.pattern.value for c in node.cases if isinstance(c.pattern, ast.MatchValue))]
        else:
            continue
        listed = [entry for side in sides for entry in getattr(side, "elts", [side])]
        words = {entry.value for entry in listed if isinstance(entry, ast.Constant)}
        every = [inner for side in sides for inner in ast.walk(side)]
        asked = {inner.id for inner in every if isinstance(inner, ast.Name)}
        asked |= {inner.attr for inner in every if isinstance(inner, ast.Attribute)}
        if asked & {"name", "composition", "method"} and words & (NAMES | {"multitask_", "_pp", "uniform"}):
            yield ast.unparse(node)


def test_no_module_compares_the_name_of_a_composition_or_method() -> None:
    found = {
        str(path.relative_to(ROOT)): list(comparisons(path.read_text(encoding="utf-8")))
        for folder in ("fusion", "pipelines")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {path: asked for path, asked in found.items() if asked and path not in TABLES} == {}


@pytest.mark.parametrize(
    "source",
    [
        'config.composition.name == "mean"',
        'name in ("average", "continued")',
        '"uniform" in config.name',
        'config.name.startswith("scalearn")',
        'config.method.name.removeprefix("multitask_")',
        'match composition:\n    case "static":\n        pass',
    ],
)
def test_a_comparison_of_a_name_is_detected(source: str) -> None:
    assert list(comparisons(source))
    assert not list(comparisons('manifest.kind == "adapter" or pooling == "mean"'))

"""Ways to adapt one task: placements, LoRA, BitFit, full fine-tuning, shared adapters, AdapterDrop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, MT5Config, T5Config

from fusion.backbones.families import FAMILIES
from fusion.backbones.load import Backbone, load_backbone
from fusion.config.compositions import CompositionConfig
from fusion.config.methods import METHODS, MethodConfig
from fusion.config.model import AdapterConfig, BackboneConfig
from fusion.errors import UserError
from fusion.layers.heads import TaskHead
from fusion.layers.slot_module import parameters_of
from fusion.model.adapted import AdaptedModel
from fusion.model.build import new_adapters, stored_model, tuning_of
from fusion.store.artifacts import Artifact, load
from fusion.training.module import Objective, TaskModule
from tests.bench import Bench, same

IDS = torch.tensor([[2, 7, 8, 9, 3], [2, 10, 3, 0, 0]])
MASK = (IDS != 0).long()
PLACEMENTS = {
    "learned": AdapterConfig("parallel", reads="input", scaling="learned", init="zero_up"),
    "before_attention": AdapterConfig("before_attention", sites=["before_attention"], reads="input"),
    "both": AdapterConfig("both", sites=["before_attention", "feedforward"], reads="input", scaling=4.0),
    "shared": AdapterConfig(shared=True, bottleneck_size=5),
    "shared twice": AdapterConfig(
        "houlsby", sites=["attention", "feedforward"], reads="output", layers=[0, 2], shared=True
    ),
}


def stored(bench: Bench, name: str) -> AdaptedModel:
    artifact = load(name, bench.folder / "store")
    return stored_model(artifact, artifact.path.parent, load_backbone(str(bench.backbone)))


@pytest.mark.parametrize("name", [name for name in PLACEMENTS if name != "before_attention"])  # as in "both"
def test_each_placement_trains_is_evaluated_alike_and_can_be_fused(bench: Bench, name: str) -> None:
    config = PLACEMENTS[name]
    result = bench.stage1("films", adapter=config)
    again = bench.evaluate("films")["metrics"]["validation"]
    assert again == pytest.approx(result["metrics"]["validation"], abs=1e-6)
    bench.stage1("books", adapter=dataclasses.replace(config, bottleneck_size=3), name="books")
    fused = bench.stage2("plays", ["films", "books"])
    again = bench.evaluate("plays-adapterfusion")["metrics"]["validation"]
    assert again == pytest.approx(fused["metrics"]["validation"], abs=1e-6)
    layers = config.layers or [0, 1, 2]
    slots = {n.rsplit(".", 2)[0] for n in bench.weights("plays-adapterfusion")}
    assert slots == {f"{layer}.{site}" for layer in layers for site in config.sites}
    weights = bench.weights("films")
    scalings = [value for key, value in weights.items() if key.endswith(".scaling")]
    assert len(scalings) == (3 if name == "learned" else 0)
    assert all(value.shape == () and value != 1 for value in scalings)
    if name == "shared":
        check_stored_once(bench, result)


def check_stored_once(bench: Bench, result: dict[str, Any]) -> None:
    assert set(bench.weights("films")) == {
        f"0.feedforward.{part}.{kind}" for part in ("down", "up") for kind in ("weight", "bias")
    }
    assert result["parameters"]["trainable"] == 2 * 32 * 5 + 5 + 32 + (2 * 32 + 2)
    model = stored(bench, "films")
    assert len({id(module) for module in model.slot_modules().values()}) == 1 and len(model.slot_modules()) == 3


SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 16, "dropout": 0.1, "targets": ["query", "value", "dense"]}
}
TUNED = {
    name: MethodConfig(name, **SETTINGS.get(name, {}))
    for name, method in METHODS.items()
    if method.tune is not None and not method.multitask
}


def linear_layers(names: set[str]) -> set[str]:
    ends = tuple(f"{target}.weight" for target in SETTINGS["lora"]["targets"])
    return {name.removesuffix(".weight") for name in names if name.endswith(ends)}


TRAINS: dict[str, Callable[[set[str]], set[str]]] = {
    "lora": lambda names: {f"{n}.lora_{ab}.weight" for n in linear_layers(names) for ab in "AB"},
    "bitfit": lambda names: {n for n in names if n.endswith(".bias")},
    "full": lambda names: names,
}
"""Of each method that trains inside the backbone, the names that it stores, from the backbone's."""


@pytest.mark.parametrize("name", TUNED)
def test_each_method_trains_exactly_its_parameters_and_is_evaluated_alike(bench: Bench, name: str) -> None:
    assert name in TRAINS, f"say in TRAINS which parameters {name} trains"
    result = bench.stage1("films", method=TUNED[name])
    plain = {n for n, _ in load_backbone(str(bench.backbone)).model.named_parameters()}
    assert set(bench.weights(f"films-{name}")) == TRAINS[name](plain)
    assert result["name"] == f"films-{name}" and result["stage"] == 1
    again = bench.evaluate(f"films-{name}")["metrics"]["validation"]
    assert again == pytest.approx(result["metrics"]["validation"], abs=1e-6)
    (line,) = bench.predict(f"films-{name}", [{"text": "a good film"}])
    assert set(line) == {"label", "scores"}
    if name != "lora":  # see tests/test_lora_sources.py
        with pytest.raises(UserError, match=rf"films-{name} is a stored {name}, expected an adapter or a LoRA"):
            bench.stage2("books", [f"films-{name}"])
    with pytest.raises(UserError, match=rf"drop=1: films-{name} is .*expected an adapter or a fusion"):
        bench.evaluate(f"films-{name}", drop=1)


def test_lora_is_initialized_as_the_identity_and_merges(tiny_backbone: Path) -> None:
    plain = AdaptedModel(load_backbone(str(tiny_backbone)), {}, "normed", TaskHead(32, 2)).eval()
    backbone = load_backbone(str(tiny_backbone))
    names = list(dict(backbone.model.named_parameters()))
    torch.manual_seed(0)
    tuning = tuning_of(TUNED["lora"], backbone)
    model = AdaptedModel(backbone, {}, "normed", plain.head, tuning=tuning)
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    assert (
        training
        == set(model.trainable())
        == {"head.output.weight", "head.output.bias", *(n for n, _ in model.named_parameters() if ".lora_" in n)}
    )
    before = model.eval()(IDS, MASK)
    torch.testing.assert_close(before, plain(IDS, MASK), rtol=0, atol=1e-6)
    with torch.no_grad():
        for parameter in model.tuning.parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    scores = model.eval()(IDS, MASK)
    assert (scores - before).abs().max() > 1e-2
    merged = model.merged()
    torch.testing.assert_close(merged(IDS, MASK), scores, rtol=0, atol=1e-5)
    assert [n for n, _ in merged.backbone.named_parameters()] == names  # LoRA's forward is no longer called


def test_only_its_own_dropout_is_active_in_lora(tiny_backbone: Path) -> None:
    for dropout, equal in ((0.0, True), (0.5, False)):
        backbone = load_backbone(str(tiny_backbone))
        torch.manual_seed(0)
        tuning = tuning_of(MethodConfig("lora", dropout=dropout), backbone)
        model = AdaptedModel(backbone, {}, "normed", TaskHead(32, 2), tuning=tuning).train()
        with torch.no_grad():
            for parameter in model.tuning.parameters.values():
                parameter.add_(0.1)
        assert torch.equal(model(IDS, MASK), model(IDS, MASK)) == equal


def test_an_unknown_lora_target_is_refused(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"no linear layer called q_proj; expected some of dense, key, query, value"):
        bench.stage1("films", method=MethodConfig("lora", targets=["q_proj"]))


def test_full_fine_tuning_uses_the_backbone_dropout_by_default(bench: Bench) -> None:
    for store, dropout in (("default", None), ("with", True), ("without", False)):
        backbone = BackboneConfig(name_or_path=str(bench.backbone), pooling="mean", dropout=dropout)
        bench.stage1("films", method=TUNED["full"], backbone=backbone, store=str(bench.folder / store))
    weights = [bench.weights("films-full", store) for store in ("default", "with", "without")]
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


def test_frozen_parameters_do_not_change(bench: Bench) -> None:
    plain = dict(load_backbone(str(bench.backbone)).model.named_parameters())
    bench.stage1("films", method=TUNED["bitfit"])
    model = stored(bench, "films-bitfit")
    for name, parameter in model.backbone.named_parameters():
        assert torch.equal(parameter, plain[name]) != name.endswith(".bias"), name


# --- AdapterDrop ------------------------------------------------------------------------------------


def test_specialised_adapters_are_above_the_dropped_layers(bench: Bench) -> None:
    bench.stage1("films", adapter=AdapterConfig(drop="specialized:2"))
    assert {name.split(".")[0] for name in bench.weights("films")} == {"2"}
    with pytest.raises(UserError, match=r"adapter.drop=specialized:3: no layer is left .* to specialized:2"):
        bench.stage1("books", adapter=AdapterConfig(drop="specialized:3"))


def test_dropped_layers_equal_layers_without_adapters(bench: Bench) -> None:
    bench.stage1("films")
    bench.stage1("books")
    bench.stage2("plays", ["films", "books"])
    for name in ("films", "plays-adapterfusion"):
        artifact = load(name, bench.folder / "store")

        def scores(drop: int, first_layer: int, artifact: Artifact = artifact) -> torch.Tensor:
            model = stored_model(artifact, artifact.path.parent, load_backbone(str(bench.backbone)), drop)
            return model(IDS, MASK, first_layer=first_layer)

        for drop in (1, 2, 3):
            torch.testing.assert_close(scores(drop, 0), scores(0, drop))
        assert not torch.allclose(scores(0, 0), scores(2, 0))
        torch.testing.assert_close(scores(3, 0), stored_without(bench, artifact))
        assert bench.evaluate(name, drop=2)["drop"] == 2
        with pytest.raises(UserError, match=r"drop=4: .* has 3 layers"):
            bench.evaluate(name, drop=4)


def stored_without(bench: Bench, artifact: Artifact) -> torch.Tensor:
    head = TaskHead(32, **artifact.manifest.head.shape)
    head.load_state_dict(artifact.head)
    return AdaptedModel(load_backbone(str(bench.backbone)), {}, "normed", head).eval()(IDS, MASK)


def test_robust_training_drops_layers_uniformly_and_equally_on_every_rank(bench: Bench) -> None:
    backbone = load_backbone(str(bench.backbone))
    model = AdaptedModel(backbone, new_adapters(AdapterConfig(), backbone), "normed", TaskHead(32, 2))
    task = bench.tasks["films"]
    optim = bench.settings("films")["optim"]
    module = TaskModule(model, [task], optim, Objective(robust_drop=True), {}, seed=7)
    drawn = [module.first_layer(batch) for batch in range(600)]
    assert drawn == [module.first_layer(batch) for batch in range(600)]
    assert all(150 < drawn.count(layer) < 250 for layer in range(3)) and set(drawn) == {0, 1, 2}
    assert {TaskModule(model, [task], optim, Objective(), {}).first_layer(batch) for batch in range(9)} == {0}


def test_only_layers_with_slots_are_drawn(tiny_backbone: Path, bench: Bench) -> None:
    backbone = load_backbone(str(tiny_backbone))
    config = AdapterConfig(layers=[0, 2])
    model = AdaptedModel(backbone, new_adapters(config, backbone), "normed", TaskHead(32, 2))
    optim = bench.settings("films")["optim"]
    module = TaskModule(model, [bench.tasks["films"]], optim, Objective(robust_drop=True), {}, seed=7)
    drawn = [module.first_layer(batch) for batch in range(200)]
    assert set(drawn) == {0, 2} and 70 < drawn.count(0) < 130


@pytest.mark.parametrize("reads", ["normed", "input"])
def test_cached_features_and_dropped_layers_go_together(tiny_backbone: Path, reads: str) -> None:
    backbone = load_backbone(str(tiny_backbone))
    config = AdapterConfig(layers=[1, 2], reads=reads, nonlinearity="tanh")
    slot_modules = new_adapters(config, backbone)
    for slot_module in slot_modules.values():
        torch.nn.init.normal_(slot_module.get_parameter("up.weight"))
    model = AdaptedModel(backbone, slot_modules, reads, TaskHead(32, 2)).eval()
    features = model.frozen_features(IDS, MASK)
    whole = [model(IDS, MASK, first_layer=n) for n in range(4)]
    model.take_features()
    for first_layer, expected in enumerate(whole):
        torch.testing.assert_close(model(IDS, MASK, features=features, first_layer=first_layer), expected)
    assert not torch.allclose(whole[1], whole[2]) and not torch.allclose(whole[2], whole[3])


RESUMED: dict[str, dict[str, Any]] = {
    "robust": {"adapter": AdapterConfig(drop="robust", shared=True, scaling="learned")},
    "lora": {"method": MethodConfig("lora", dropout=0.1)},
    "full": {"method": MethodConfig("full")},
}


@pytest.mark.parametrize("name", RESUMED)
def test_an_interrupted_run_resumes_bit_equal(bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(store: str) -> Any:
        return bench.stage1("films", name="it", store=str(bench.folder / store), **RESUMED[name])

    expected = train("whole")
    step = TaskModule.training_step

    def broken(module: TaskModule, batch: Any, batch_index: int) -> torch.Tensor:
        if module.current_epoch == 1 and batch_index == 3:
            raise RuntimeError("the power went off")
        return step(module, batch, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(TaskModule, "training_step", broken)
        with pytest.raises(RuntimeError, match="the power went off"):
            train("broken")
    resumed = train("broken")
    assert resumed["metrics"] == expected["metrics"] and resumed["best_epoch"] == expected["best_epoch"]
    assert same(bench.weights("it", "broken"), bench.weights("it", "whole"))


def test_dropped_layers_get_a_gradient_of_zero(tiny_backbone: Path) -> None:
    backbone = load_backbone(str(tiny_backbone))
    config = AdapterConfig(nonlinearity="tanh")  # no unit is dead, whatever is drawn
    model = AdaptedModel(backbone, new_adapters(config, backbone), "normed", TaskHead(32, 2))
    model.train()
    model(IDS, MASK, first_layer=2).sum().backward()
    for name, parameter in model.trainable().items():
        assert parameter.grad is not None
        dropped = name.startswith(("slots.0", "slots.1"))
        assert (parameter.grad.abs().max() == 0) == dropped, name


def test_robust_training_is_a_setting_of_the_stored_run(bench: Bench) -> None:
    for store, drop in (("one", "robust"), ("two", "robust"), ("plain", None)):
        bench.stage1("films", adapter=AdapterConfig(drop=drop), store=str(bench.folder / store))
    assert same(bench.weights("films", "one"), bench.weights("films", "two"))
    assert not same(bench.weights("films", "one"), bench.weights("films", "plain"))
    assert set(bench.weights("films", "one")) == set(bench.weights("films", "plain"))


def test_a_fusion_can_be_trained_with_dropped_layers(bench: Bench) -> None:
    bench.stage1("films")
    result = bench.stage2("plays", ["films"], composition=CompositionConfig(drop="specialized:1"), name="less")
    assert {name.split(".")[0] for name in bench.weights("less")} == {"1", "2"}
    again = bench.evaluate("less")["metrics"]["validation"]
    assert again == pytest.approx(result["metrics"]["validation"], abs=1e-6)


def test_a_robustly_trained_fusion_is_pruned_and_fine_tuned_robustly(bench: Bench) -> None:
    for task in ("films", "books"):
        bench.stage1(task)
    for name, drop in (("plain", None), ("robust", "robust"), ("robust-again", "robust")):
        bench.stage2("plays", ["films", "books"], composition=CompositionConfig(drop=drop), name=name)
    assert same(bench.weights("robust"), bench.weights("robust-again"))
    assert not same(bench.weights("robust"), bench.weights("plain"))
    drawn: list[int] = []
    first_layer = TaskModule.first_layer

    def spy(module: TaskModule, batch_index: int) -> int:
        drawn.append(first_layer(module, batch_index))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskModule, "first_layer", spy)
        pruned = CompositionConfig("pruned", fusion="robust", keep=1, train=True)
        bench.stage2("plays", [], composition=pruned, name="pruned")
    assert set(drawn) == {0, 1, 2}


def test_sources_without_adapters_in_a_layer_have_no_fusion_there(bench: Bench) -> None:
    for name in ("films", "books"):
        bench.stage1(name, adapter=AdapterConfig(drop="specialized:1"))
    bench.stage2("plays", ["films", "books"])
    assert {name.split(".")[0] for name in bench.weights("plays-adapterfusion")} == {"1", "2"}


# --- what cannot be ---------------------------------------------------------------------------------


def test_sources_of_other_sites_are_refused_with_the_valid_ones(bench: Bench) -> None:
    bench.stage1("films")
    bench.stage1("books", adapter=PLACEMENTS["before_attention"])
    with pytest.raises(UserError, match=r"books cannot be fused with films: adapter.sites \[before_attention\]"):
        bench.stage2("plays", ["films", "books"])


def test_a_placement_that_a_family_does_not_have_is_refused(tiny_backbone: Path) -> None:
    backbone = load_backbone(str(tiny_backbone))
    stack = backbone.family.first_stack
    sites = {site: wiring for site, wiring in stack.sites.items() if site != "before_attention"}
    family = dataclasses.replace(backbone.family, stacks={"": dataclasses.replace(stack, sites=sites)})
    with pytest.raises(UserError, match=r"has no site before_attention; expected .* attention, feedforward"):
        new_adapters(PLACEMENTS["before_attention"], dataclasses.replace(backbone, family=family))
    with pytest.raises(UserError, match=r"has no site cross_attention; expected .* attention, feedforward"):
        new_adapters(AdapterConfig(sites=["cross_attention"], reads="output"), backbone)
    with pytest.raises(UserError, match=r"adapter\.stacks=\['decoder'\]: .* has no decoder, but a single stack"):
        new_adapters(AdapterConfig(stacks=["decoder"]), backbone)


# --- the published numbers of parameters ------------------------------------------------------------


@pytest.fixture(scope="module")
def bert_base() -> Backbone:
    """BERT-base's shape, without memory for its weights."""
    with torch.device("meta"):
        model = BertModel(BertConfig(), add_pooling_layer=False)
    return Backbone("bert-base", model, FAMILIES["bert"], "none", 768, cast(Any, None), "none")


def count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


PUBLISHED = {
    "pfeiffer": (AdapterConfig(), 894_528),
    "houlsby": (AdapterConfig("houlsby", sites=["attention", "feedforward"], reads="output"), 1_789_056),
    "shared": (AdapterConfig(shared=True), 894_528 // 12),
    "half dropped": (AdapterConfig(drop="specialized:6"), 894_528 // 2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_adapters_of_bert_base_have_the_published_number_of_parameters(name: str, bert_base: Backbone) -> None:
    config, expected = PUBLISHED[name]
    with torch.device("meta"):
        model = AdaptedModel(
            dataclasses.replace(bert_base, model=BertModel(BertConfig(), add_pooling_layer=False)),
            new_adapters(config, bert_base),
            config.reads,
            TaskHead(768, 2),
        )
    assert count(model.weight_state().values()) == expected
    assert count(model.trainable().values()) == expected + 2 * 768 + 2


def test_fusion_of_bert_base_has_the_published_number_of_parameters(bert_base: Backbone) -> None:
    from fusion.layers.attention import AdapterFusion
    from fusion.layers.bank import AdapterBank
    from fusion.layers.bottleneck import BottleneckAdapter

    one = AdapterFusion(AdapterBank([BottleneckAdapter(768, 48)], [0], 1))
    assert 12 * count(one.parameters()) == 12 * (3 * 768**2 + 2 * 768) == 21_252_096


def test_lora_of_bert_base_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = BertModel(BertConfig(), add_pooling_layer=False)
        backbone = Backbone("bert-base", model, FAMILIES["bert"], "none", 768, cast(Any, None), "none")
        tuning = tuning_of(MethodConfig("lora"), backbone)
    assert tuning is not None and count(tuning.parameters.values()) == 294_912


def without_weights(config: Any, family: str) -> Backbone:
    """A backbone of this shape, without memory for its weights."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return Backbone(family, model, FAMILIES[family], "none", config.hidden_size, cast(Any, None), "none")


def test_lora_has_the_numbers_of_parameters_that_peft_documents() -> None:
    """GPT-2: "trainable params: 294,912" with r=8 on c_attn; mT0-large: 2359296 with r=8, in peft's README."""
    large = MT5Config(d_model=1024, d_ff=2816, num_layers=24, num_heads=16, d_kv=64)
    for backbone, expected in (
        (without_weights(GPT2Config(), "gpt2"), 294_912),
        (without_weights(large, "mt5"), 2_359_296),
    ):
        with torch.device("meta"):
            tuning = tuning_of(MethodConfig("lora"), backbone)
        assert tuning is not None and count(tuning.parameters.values()) == expected


def test_adapters_of_t5_base_have_the_published_share_of_its_parameters() -> None:
    """0.832 % with the layer norms, Karimi Mahabadi et al. 2021, "Compacter", Table 1: Houlsby adapters of size 24."""
    config = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
    backbone = without_weights(config, "t5")
    houlsby = AdapterConfig("houlsby", sites=["attention", "feedforward"], reads="output", bottleneck_size=24)
    with torch.device("meta"):
        adapters = count(parameters_of(new_adapters(houlsby, backbone)).values())
    norms = count(p for name, p in backbone.model.named_parameters() if "layer_norm" in name)
    whole = count(backbone.model.parameters())
    assert (adapters, norms, whole) == (1_807_488, 47_616, 222_903_552)
    assert round(100 * (adapters + norms) / whole, 3) == 0.832

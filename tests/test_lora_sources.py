"""LoRAs as sources of stage 2: the same compositions over banks of LoRAs, at the linear layers of the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fusion.analysis.ranking.selection import settle_sources
from fusion.config.compositions import COMPOSITIONS, CompositionConfig
from fusion.config.methods import MethodConfig
from fusion.config.stages import Stage2Config
from fusion.errors import UserError
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from fusion.model.build import backbone_of, build_composition, stored_adapters, stored_model
from fusion.model.from_manifests import tensor_shapes
from fusion.store.artifacts import load, verify
from fusion.store.lookup import read_manifest
from tests.bench import Bench, same

LORA = CompositionConfig(rank=4, value_matrix=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Bench:
    """LoRAs with different ranks, scalings and target layers, and an adapter."""
    bench = Bench(tmp_path_factory.mktemp("lora"), tiny_backbone)
    bench.stage1("films", name="films-lora", method=MethodConfig("lora", rank=2, alpha=4))
    targets = ["query", "dense"]  # BERT calls three layers so
    bench.stage1("books", name="books-lora", method=MethodConfig("lora", rank=3, alpha=3, targets=targets))
    bench.stage1("films", name="films")
    return bench


def test_the_manifest_describes_the_lora_in_each_layer(trained: Bench) -> None:
    store = trained.folder / "store"
    films, books = (read_manifest(f"{name}-lora", store) for name in ("films", "books"))
    sizes = {"rank": 2, "scaling": 2.0, "input_size": 32, "output_size": 32}
    slots = [f"{layer}.attention.{part}" for layer in range(3) for part in ("query", "value")]
    assert films.content["lora"] == dict.fromkeys(slots, sizes)
    assert films.sites == ["attention.query", "attention.value"] and films.reads == "input"
    assert set(books.sites) == {"attention.query", "attention.output", "feedforward.up", "feedforward.down"}
    assert books.content["lora"]["1.feedforward.up"] == sizes | {"rank": 3, "scaling": 1.0, "output_size": 64}
    for manifest, rank in ((films, 2), (books, 3)):
        adapters = stored_adapters(load(manifest.name, store))
        assert set(adapters) == set(manifest.bottleneck_sizes)
        assert {adapter.down.out_features for adapter in adapters.values()} == {rank}


def test_one_lora_with_weight_one_equals_peft(trained: Bench) -> None:
    """The mean of one source equals the model with peft's modules, which training uses."""
    artifact = load("books-lora", trained.folder / "store")
    batch = torch.tensor([[2, 5, 9, 7, 3, 0], [2, 11, 6, 3, 0, 0]]), torch.tensor([[1] * 5 + [0], [1] * 4 + [0] * 2])
    modules = build_composition(CompositionConfig("mean"), [artifact], backbone_of(artifact.manifest))
    backbone = backbone_of(artifact.manifest)
    head = TaskHead(hidden_size=32, outputs=2, pooling="mean", layers=1, dropout=0.0)
    mixed = AdaptedModel(backbone, modules, "input", head).double().eval()
    theirs = stored_model(artifact, trained.folder / "store", backbone_of(artifact.manifest)).double().eval()
    bare = AdaptedModel(backbone_of(artifact.manifest), {}, "input", head).double().eval()
    with torch.inference_mode():
        expected = theirs.hidden_states(*batch)
        torch.testing.assert_close(mixed.hidden_states(*batch), expected, rtol=0, atol=1e-7)  # peft merges in float32
        assert not torch.allclose(bare.hidden_states(*batch), expected, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if name not in ("average", "pruned")])
def test_every_composition_is_trained_stored_and_evaluated(trained: Bench, name: str) -> None:
    settings: dict[str, Any] = {"rank": 4, "value_matrix": False} if name in ("adapterfusion", "sequence") else {}
    composition = CompositionConfig(name, **settings)
    before = trained.weights("films-lora")
    sources = ["films-lora", "books-lora"]
    result = trained.stage2("plays", sources, composition=composition, name=f"plays-{name}", overwrite=True)
    assert result["sources"] == sources and same(trained.weights("films-lora"), before)
    evaluated = trained.evaluate(f"plays-{name}", split="validation")
    for metric, value in result["metrics"]["validation"].items():
        assert evaluated["metrics"]["validation"][metric] == pytest.approx(value, abs=1e-6)
    weights = trained.weights(f"plays-{name}")
    slots = {key.rpartition(".")[0].split(".query")[0] for key in weights}
    if name == "adapterfusion":
        assert {key.partition(".query.")[0] for key in weights if key.startswith("1.feedforward.up.query")} == {
            "1.feedforward.up"
        }
        assert weights["1.feedforward.up.key.weight"].shape == (4, 64)
        assert weights["1.feedforward.up.query.weight"].shape == (4, 32)
        assert not any(".value.weight" in key for key in weights) and slots


def test_other_commands_read_it(trained: Bench) -> None:
    trained.stage2("plays", ["films-lora", "books-lora"], composition=LORA, name="plays-both", overwrite=True)
    inspected, _ = trained.inspect("plays-both")
    assert set(inspected["attention"]) == {"films-lora", "books-lora"}
    averaged = trained.stage2("plays", ["films-lora"], composition=CompositionConfig("average"), name="plays-average")
    assert averaged["sources"] == ["films-lora"]
    pruned = CompositionConfig("pruned", fusion="plays-both", keep=1)
    assert trained.stage2("plays", [], composition=pruned, name="plays-pruned")["sources"] == [
        "films-lora",
        "books-lora",
    ]
    new = CompositionConfig("adapterfusion", rank=4, value_matrix=False, target_adapter=True, null_source=True)
    trained.stage2("plays", ["films-lora", "books-lora"], composition=new, name="plays-new")
    weights = trained.weights("plays-new")
    assert weights["0.feedforward.up.target.up.weight"].shape == (64, 3)
    assert "0.feedforward.up.target.up.bias" not in weights
    assert len(trained.predict("plays-both", [{"text": "a good film"}])) == 1


@pytest.mark.parametrize(
    ("gate", "layers"),
    [("slot", ["query.weight", "query.bias", "key.weight", "key.bias"]), ("layer", [0, 1, 2]), ("model", [0])],
)
def test_gates_are_stored_once(trained: Bench, gate: str, layers: list[Any]) -> None:
    composition = CompositionConfig(rank=4, value_matrix=False, gate=gate, null_source=True)
    name, sources = f"plays-gate-{gate}", ["films-lora", "books-lora"]
    result = trained.stage2("plays", sources, composition=composition, name=name)
    weights = trained.weights(name)
    if gate == "slot":
        assert len(weights) == 3 * 5 * len(layers)  # query, value, and three other linear layers of books-lora
    else:
        parts = {"query.weight": (4, 32), "query.bias": (4,), "keys": (2, 4)}
        assert {key: tuple(value.shape) for key, value in weights.items()} == {
            f"{layer}.attention.query.gate.{part}": shape for layer in layers for part, shape in parts.items()
        }
        assert weights["0.attention.query.gate.keys"].any()
    evaluated = trained.evaluate(name, split="validation")
    assert evaluated["metrics"]["validation"] == pytest.approx(result["metrics"]["validation"], abs=1e-6)
    assert all("ok" in str(verdict) for verdict in verify(trained.folder / "store", tensor_shapes, name))
    inspected, _ = trained.inspect(name)
    assert set(inspected["attention"]) == set(sources)
    if gate != "slot":
        with pytest.raises(UserError, match=rf"has composition.gate={gate}, so its slots share weights"):
            pruned = CompositionConfig("pruned", fusion=name, keep=1)
            trained.stage2("plays", [], composition=pruned, name="plays-pruned-gate")


@pytest.mark.parametrize("merge", ["ties", "dare"])
def test_merged_loras(trained: Bench, merge: str) -> None:
    """The merge is computed again when the model is loaded, with the same draws."""
    trained.stage1("films", name="more-lora", method=MethodConfig("lora", rank=2, alpha=4), seed=7, overwrite=True)
    composition, name = CompositionConfig("average", merge=merge, density=0.25), f"plays-{merge}"
    result = trained.stage2("plays", ["films-lora", "more-lora"], composition=composition, name=name)
    assert trained.weights(name) == {}
    evaluated = trained.evaluate(name, split="validation")
    assert evaluated["metrics"]["validation"] == pytest.approx(result["metrics"]["validation"], abs=1e-6)


def test_defaults_of_lora_sources(trained: Bench) -> None:
    def settled(sources: list[str], *overrides: str, **settings: Any) -> CompositionConfig:
        config = Stage2Config(**trained.settings("plays", composition=CompositionConfig(**settings)), sources=sources)
        settle_sources(config, overrides)
        return config.composition

    assert settled(["films-lora"]) == CompositionConfig(rank=32, value_matrix=False, gate="layer")
    assert settled(["films-lora"], "composition.value_matrix=true").value_matrix is True
    assert settled(["films-lora"], rank=8).rank == 8
    assert settled(["films"]) == CompositionConfig()
    assert settled(["films-lora"], name="mean") == CompositionConfig("mean")


def test_invalid_sources(trained: Bench) -> None:
    with pytest.raises(UserError, match="films cannot be fused with films-lora: kind adapter, expected lora"):
        trained.stage2("plays", ["films-lora", "films"], composition=LORA, name="mixed")
    with pytest.raises(UserError, match="composition=average requires equal shapes, but books-lora differs from films"):
        trained.stage2("plays", ["films-lora", "books-lora"], composition=CompositionConfig("average"), name="unequal")

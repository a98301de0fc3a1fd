"""The tensors that a manifest describes, without weights, against those of the modules that hold the weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fusion.backbones.load import Backbone
from fusion.config.compositions import CompositionConfig
from fusion.errors import UserError
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead, TaskHeads
from fusion.layers.slot_module import SlotModule, parameters_of
from fusion.model.build import build_composition, stored_adapters
from fusion.model.from_manifests import head_shapes, weight_shapes
from fusion.store.artifacts import Artifact
from fusion.store.layout import HEAD, WEIGHTS
from fusion.store.manifest import Manifest
from tests.store.conftest import build

LAYERS = 4
FILES = {file: {"sha256": "0" * 64, "bytes": 1} for file in (WEIGHTS, HEAD)}


def shapes_of(tensors: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def fusion(composition: dict[str, Any]) -> Manifest:
    sources = [{"name": name, "hash": name} for name in ("a", "b", "c")]
    return build("f", "fusion", backbone={"layers": LAYERS}, sources=sources).changed(composition=composition)


def adapter(name: str, sizes: dict[str, int], **settings: Any) -> Artifact:
    settings |= {"bottleneck_sizes": sizes}
    settings["sites"] = settings.pop("sites", None) or ["feedforward"]
    manifest = build(name, backbone={"layers": LAYERS}, adapter=settings, files=FILES)
    shared = settings.get("shared", False)
    slot_modules: dict[str, SlotModule] = {}
    first: dict[str, BottleneckAdapter] = {}
    for slot, size in sizes.items():
        made = BottleneckAdapter(8, size, scaling=settings.get("scaling", 1.0))
        slot_modules[slot] = first.setdefault(slot.partition(".")[2], made) if shared else made
    weights = {key: value.detach() for key, value in parameters_of(slot_modules).items()}
    return Artifact(Path("store") / name, manifest, weights, {})


EVERY = {f"{layer}.feedforward": 2 for layer in range(LAYERS)}
SOURCES = {
    "alike": [adapter("a", EVERY), adapter("b", EVERY), adapter("c", EVERY)],
    "learned": [adapter("a", EVERY, scaling="learned"), adapter("b", EVERY, scaling="learned")],
    "shared": [adapter("a", EVERY, shared=True), adapter("b", EVERY, shared=True)],
    "ragged": [
        adapter("a", {"1.feedforward": 2, "2.feedforward": 3}),
        adapter("b", {"2.feedforward": 1}, scaling="learned"),
        adapter("c", EVERY, shared=True),
    ],
    "two sites": [
        adapter(
            name,
            {f"{layer}.{site}": 2 for layer in range(LAYERS) for site in ("attention", "feedforward")},
            sites=["attention", "feedforward"],
            shared=shared,
        )
        for name, shared in (("a", False), ("b", True))
    ],
}
COMPOSITIONS: list[tuple[CompositionConfig, dict[str, Any]]] = [
    *((CompositionConfig(name), {}) for name in ("adapterfusion", "sequence", "static", "mean", "average")),
    *((CompositionConfig(f"scalearn{how}"), {}) for how in ("", "_uniform", "_pp", "_uniform_pp")),
    (CompositionConfig(value_matrix=False, rank=3), {}),
    (CompositionConfig("average", train=True), {}),
    (CompositionConfig("continued"), {"continued": "b"}),
    (CompositionConfig(target_adapter=True, layers="last:2"), {}),
    (CompositionConfig("scalearn_pp", target_adapter=True, layers=[1, 2]), {}),
    (CompositionConfig("average", train=True, target_adapter=True, drop="specialized:1"), {}),
    (CompositionConfig("pruned", fusion="f", keep=1, target_adapter=True), {"kept": 1}),
    (CompositionConfig("pruned", fusion="f", keep=1, rank=2), {"kept": 1}),
]


@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize(("config", "chosen"), COMPOSITIONS)
def test_of_every_composition(sources: str, config: CompositionConfig, chosen: dict[str, Any]) -> None:
    loaded = SOURCES[sources]
    if "kept" in chosen:
        slots = {slot for source in loaded for slot in source.manifest.bottleneck_sizes}
        last = {
            slot: max(n for n, source in enumerate(loaded) if slot in source.manifest.bottleneck_sizes)
            for slot in slots
        }
        chosen = {"kept": {slot: [position] for slot, position in last.items()}}
    backbone = cast(Backbone, SimpleNamespace(hidden_size=8, depths={"": LAYERS}))
    manifest = fusion(config.as_stored() | chosen)
    if config.definition.one_shape and sources == "ragged":
        for build_it in (
            lambda: build_composition(config, loaded, backbone, chosen),
            lambda: weight_shapes(manifest, [s.manifest for s in loaded], Path("store/f")),
        ):
            with pytest.raises(UserError, match="all source adapters must have the same shape"):
                build_it()
        return
    built = parameters_of(build_composition(config, loaded, backbone, chosen))
    assert weight_shapes(manifest, [s.manifest for s in loaded], Path("store/f")) == shapes_of(built)


@pytest.mark.parametrize("sources", SOURCES)
def test_of_adapters(sources: str) -> None:
    for source in SOURCES[sources]:
        assert weight_shapes(source.manifest, [], Path("a")) == shapes_of(source.weights)
        assert shapes_of(parameters_of(stored_adapters(source))) == shapes_of(source.weights)


@pytest.mark.parametrize("layers", [1, 2])
def test_of_heads(layers: int) -> None:
    head = {"pooling": "mean", "layers": layers, "outputs": 3, "dropout": 0.0}
    made = TaskHead(8, 3, "mean", layers)
    assert head_shapes(build(head=head), Path("h")) == shapes_of(dict(made.named_parameters()))
    multi_task = {name: {"task": {"name": name}, "head": head} for name in ("a", "b.c")}
    assert head_shapes(build(multitask=multi_task), Path("h")) == shapes_of(
        TaskHeads(dict.fromkeys(multi_task, made)).state()
    )


def test_of_other_kinds() -> None:
    assert weight_shapes(build("h", "head"), [], Path("h")) == {}
    assert weight_shapes(build("l", "lora", method={"name": "lora"}), [], Path("l")) is None


@pytest.mark.parametrize(
    ("composition", "says"),
    [
        ({"name": "continued"}, "composition.continued is missing"),
        ({"name": "continued", "continued": "z"}, "continued is not one of the sources"),
        ({"name": "mean", "continued": "a"}, "composition.continued is not allowed for mean"),
        ({"name": "pruned", "keep": 1}, "composition.kept is missing"),
        ({"name": "adapterfusion", "kept": {}}, "composition.kept is not allowed for adapterfusion"),
        ({"name": "pruned", "keep": 1, "kept": {}}, "composition.kept.0.feedforward: expected distinct source indices"),
        *(
            ({"name": "pruned", "keep": 1, "kept": {"0.feedforward": kept}}, "composition.kept.0.feedforward")
            for kept in ([], [3], [-1], [0, 0])
        ),
        ({"name": "mean", "layers": "last:9"}, "composition.layers=last:9"),
        ({"name": "mean", "drop": "specialized:9"}, "composition.drop=specialized:9"),
    ],
)
def test_a_fusion_incompatible_with_its_sources(composition: dict[str, Any], says: str) -> None:
    sources: list[Manifest] = [source.manifest for source in SOURCES["alike"]]
    manifest = fusion(composition)
    with pytest.raises(UserError) as error:
        weight_shapes(manifest, sources, Path("store/f"))
    assert str(error.value).startswith("store/f/manifest.json: ") and says in str(error.value)


def test_sources_that_cannot_be_averaged() -> None:
    ragged = [source.manifest for source in SOURCES["ragged"]]
    manifest = fusion({"name": "average"})
    with pytest.raises(UserError, match="must have the same shape"):
        weight_shapes(manifest, ragged, Path("f"))

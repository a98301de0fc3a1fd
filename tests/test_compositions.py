"""Every way to combine frozen adapters through stage 2, evaluation and prediction, on a tiny backbone."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fusion import predict
from fusion.backbones.load import load_backbone
from fusion.config.commands import PredictConfig
from fusion.config.compositions import COMPOSITIONS, TRAINING_ONLY, CompositionConfig
from fusion.config.model import AdapterConfig, HeadConfig
from fusion.config.stages import Stage2Config
from fusion.config.task import TaskConfig
from fusion.config.training import TrainerConfig
from fusion.errors import UserError
from fusion.model.build import build_composition, load_sources, stored_model
from fusion.model.from_manifests import tensor_shapes
from fusion.store.artifacts import load, verify
from fusion.training.module import TaskModule
from tests.bench import Bench, add_callback, same, trainer_config, write_manifest, write_rows

NAMES = ["films", "books", "plays"]
ATTENTION = ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
ADAPTER = ("down.weight", "down.bias", "up.weight", "up.bias")
IDS = torch.tensor([[2, 7, 8, 9, 3], [2, 10, 3, 0, 0], [2, 11, 12, 3, 0]])
MASK = (IDS != 0).long()


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Bench:
    """Three sources of different shapes (books has none in layer 2), and a fusion of them."""
    bench = Bench(tmp_path_factory.mktemp("ragged") / "a folder", tiny_backbone)
    bench.stage1("films")
    bench.stage1("books", adapter=AdapterConfig(bottleneck_size=5, nonlinearity="gelu", layers=[0, 1]))
    bench.stage1("plays", adapter=AdapterConfig(bottleneck_size=3, scaling=2.0))
    bench.stage2("films", NAMES, head=HeadConfig(layers=2))
    return bench


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Bench:
    """Two sources of one shape, and one of another size."""
    bench = Bench(tmp_path_factory.mktemp("alike") / "a folder", tiny_backbone)
    for task in ("films", "books"):
        bench.stage1(task, adapter=AdapterConfig(bottleneck_size=3))
    bench.stage1("plays", adapter=AdapterConfig(bottleneck_size=4))
    return bench


def composed(bench: Bench, task: str, how: str, sources: list[str] | None = None, **changes: Any) -> Any:
    """Stage 2 with the composition `how`; `changes` are its settings, or the run's."""
    more = {key: changes.pop(key) for key in ("trainer", "name", "seed", "head", "overwrite") if key in changes}
    composition = CompositionConfig(name=how, **changes)
    return bench.stage2(task, NAMES if sources is None else sources, composition=composition, **more)


def in_slots(*parts: str, layers: int = 3) -> set[str]:
    return {f"{layer}.feedforward.{part}" for layer in range(layers) for part in parts}


def check_reproduced(bench: Bench, name: str, result: dict[str, Any]) -> None:
    scores = bench.evaluate(name)["metrics"]["validation"]
    assert scores == pytest.approx(result["metrics"]["validation"], abs=1e-6)


# --- every entry of the table -----------------------------------------------------------------------

NEEDED: dict[str, dict[str, Any]] = {"average": {"train": True}, "pruned": {"fusion": "plays-adapterfusion", "keep": 1}}
"""Settings with which a composition can be trained on the sources of `sharing`; the others take their defaults."""


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Bench:
    """Two sources of one shape, each with the same adapter in all layers."""
    bench = Bench(tmp_path_factory.mktemp("sharing") / "a folder", tiny_backbone)
    for task in ("films", "books"):
        bench.stage1(task, adapter=AdapterConfig(bottleneck_size=3, shared=True))
    return bench


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_is_trained_stored_loaded_evaluated_and_inspected(sharing: Bench, name: str) -> None:
    definition, settings = COMPOSITIONS[name], NEEDED.get(name, {})
    sources, called = ["films", "books"], f"plays-{name}"
    if definition.is_pruned:
        composed(sharing, "plays", "adapterfusion", sources)
    result = composed(sharing, "plays", name, [] if definition.is_pruned else sources, **settings)
    store = sharing.folder / "store"
    manifest = load(called, store).manifest
    assert manifest.made_by == name
    assert result["sources"] == [source.name for source in manifest.sources] == sources
    check_reproduced(sharing, called, result)
    assert all("ok" in str(verdict) for verdict in verify(store, tensor_shapes, called))
    weights = sharing.weights(called)
    if definition.share is not None and definition.shared_by == "site":  # by all layers, as these sources do
        assert weights and {key.partition(".")[0] for key in weights} == {"0"}
    if definition.no_weights:
        with pytest.raises(UserError) as error:
            sharing.inspect(called)
        expected = f"{called} (composition={name}) {definition.no_weights}; set artifact= to a fusion"
        assert str(error.value) == f"artifact={called}: {expected}"
        return
    inspected, seen = sharing.inspect(called, words=1, prune=False)
    assert list(inspected["attention"]) == list(inspected["masked"]) == sources
    assert inspected["metrics"]["validation"] == pytest.approx(result["metrics"]["validation"], abs=1e-6)
    assert list(seen["attention"]) == ["0.feedforward", "1.feedforward", "2.feedforward"]


TRAINED: list[tuple[str, dict[str, Any], set[str]]] = [
    ("adapterfusion", {"rank": 2}, in_slots(*ATTENTION)),
    ("sequence", {"rank": 2, "value_matrix": False}, in_slots(*ATTENTION[:4])),
    ("scalearn", {}, in_slots("scales")),
    ("scalearn_uniform_pp", {}, {"0.feedforward.scales"}),
]


@pytest.mark.parametrize(("name", "settings", "keys"), TRAINED)
def test_trains_with_a_target_adapter_and_predicts(
    ragged: Bench, name: str, settings: dict[str, Any], keys: set[str]
) -> None:
    called = "-".join(["plays", name, *map(str, settings)])
    result = composed(ragged, "plays", name, name=called, target_adapter=True, **settings)
    keys = {key.replace("feedforward.", "feedforward.composition.") for key in keys}
    keys = keys | in_slots(*(f"target.{part}" for part in ADAPTER))
    weights = ragged.weights(called)
    assert set(weights) == keys
    head = load_file(ragged.folder / "store" / called / "head.safetensors")
    trained = sum(tensor.numel() for tensor in [*weights.values(), *head.values()])
    assert result["parameters"]["trainable"] == trained
    check_reproduced(ragged, called, result)
    (line,) = ragged.predict(called, [{"text": "a good film"}], attention=True)
    for layer, seen in line["attention"].items():
        assert list(seen) == NAMES
        assert (seen["books"] == 0) == (layer == "2")
        if "scalearn" not in name:
            assert sum(seen.values()) == pytest.approx(1, abs=1e-5)


def test_shapes_and_trained_parameters(ragged: Bench) -> None:
    still = trainer_config()
    for name, shapes in {
        "scalearn": [(3, 32), (3, 32), (2, 32)],
        "scalearn_uniform": [(3, 1), (3, 1), (2, 1)],
        "scalearn_pp": [(3, 32)],
        "scalearn_uniform_pp": [(3, 1)],
    }.items():
        composed(ragged, "books", name, name=f"shapes-{name}", trainer=still)
        tensors = list(ragged.weights(f"shapes-{name}").values())
        assert [tuple(tensor.shape) for tensor in tensors] == shapes
        assert all((tensor - 1 / tensor.shape[0]).abs().max() > 0.004 for tensor in tensors)  # beyond the noise
    target = composed(ragged, "books", "mean", name="shapes-target", target_adapter=True)
    sizes = [ragged.weights("shapes-target")[f"{n}.feedforward.target.down.weight"].shape[0] for n in range(3)]
    assert sizes == [5, 5, 3]  # of the largest source in the slot
    assert target["parameters"]["trainable"] > 2 * 32 + 2


def test_a_shared_parameter_is_counted_once(ragged: Bench) -> None:
    frozen = set()
    for name in ("mean", "scalearn_pp"):
        frozen.add(composed(ragged, "books", name, name=f"counted-{name}")["parameters"]["frozen"])
    assert len(frozen) == 1


def test_an_interrupted_run_of_a_shared_parameter_resumes(ragged: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_stages import StopAfter

    def train(name: str) -> Any:
        trainer = trainer_config(max_epochs=3)
        return composed(ragged, "books", "scalearn_pp", name=name, trainer=trainer, target_adapter=True)

    expected = train("whole")
    with monkeypatch.context() as patch:
        add_callback(patch, StopAfter(2))
        with pytest.raises(RuntimeError, match="power"):
            train("broken")
    assert train("broken")["metrics"] == expected["metrics"]
    assert same(ragged.weights("whole"), ragged.weights("broken"))


# --- one of the source adapters --------------------------------------------------------------------


def test_an_average_is_the_mean_of_the_weights_and_only_the_head_trains(alike: Bench) -> None:
    result = composed(alike, "plays", "average", ["films", "books"])
    assert alike.weights("plays-average") == {}
    assert result["parameters"]["trainable"] == 2 * 32 + 2
    check_reproduced(alike, "plays-average", result)
    store = alike.folder / "store"
    backbone = load_backbone(str(alike.backbone))
    sources = load_sources(["films", "books"], store, backbone)
    slot_modules = build_composition(CompositionConfig(name="average", train=True), sources, backbone)
    for slot, slot_module in slot_modules.items():
        for name, parameter in slot_module.named_parameters():
            expected = sum(source.weights[f"{slot}.{name}"] for source in sources) / 2
            torch.testing.assert_close(parameter.detach(), expected)
    assert set(alike.predict("plays-average", [{"text": "good"}])[0]) == {"label", "scores"}


def test_an_average_can_be_fine_tuned(alike: Bench) -> None:
    result = composed(alike, "plays", "average", ["films", "books"], train=True, name="on")
    assert set(alike.weights("on")) == in_slots(*ADAPTER)
    means = [(alike.weights("films")[key] + alike.weights("books")[key]) / 2 for key in alike.weights("on")]
    moved = [(a - b).abs().max() for a, b in zip(alike.weights("on").values(), means, strict=True)]
    assert 0 < max(moved) < 0.1
    check_reproduced(alike, "on", result)
    with pytest.raises(UserError, match=r"on \(composition=average\) is a single adapter"):
        alike.predict("on", [{"text": "good"}], attention=True)


def test_the_average_of_one_source_is_that_source(alike: Bench) -> None:
    composed(alike, "plays", "average", ["films"], name="alone")
    store, backbone = alike.folder / "store", load_backbone(str(alike.backbone))
    alone = stored_model(load("alone", store), store, backbone)
    alone.head.load_state_dict(load("films", store).head)
    single = stored_model(load("films", store), store, load_backbone(str(alike.backbone)))
    with torch.no_grad():
        torch.testing.assert_close(alone(IDS, MASK), single(IDS, MASK), rtol=0, atol=1e-5)


def test_weights_of_different_shapes_cannot_be_averaged(alike: Bench, ragged: Bench) -> None:
    with pytest.raises(
        UserError, match=r"plays differs from films: adapter\.bottleneck_sizes .*:4.*, expected .*:3.*[\s\S]*=mean"
    ):
        composed(alike, "plays", "average", ["films", "books", "plays"], name="none")
    with pytest.raises(UserError, match=r"books differs from films: adapter\.nonlinearity gelu, expected relu"):
        composed(ragged, "plays", "average", ["films", "books"], name="none")
    with pytest.raises(UserError, match=r"adapter\.bottleneck_sizes {0\.feedforward:"):
        composed(ragged, "plays", "average", ["films", "books"], name="none")
    with pytest.raises(UserError, match=r"plays differs from films: adapter\.scaling 2\.0, expected 1\.0"):
        composed(ragged, "plays", "average", ["films", "plays"], name="none")
    assert not (alike.folder / "store" / "none").exists()


def test_one_source_continues_training(ragged: Bench) -> None:
    result = composed(ragged, "films", "continued", ["books"], name="one")
    assert result["sources"] == ["books"]
    assert load("one", ragged.folder / "store").manifest.content["composition"]["continued"] == "books"
    weights = ragged.weights("one")
    assert set(weights) == in_slots(*ADAPTER, layers=2)
    distances = {key: (value - ragged.weights("books")[key]).abs().max() for key, value in weights.items()}
    assert 0 < max(distances.values()) < 0.1
    check_reproduced(ragged, "one", result)
    with pytest.raises(UserError, match="single adapter without attention weights"):
        ragged.predict("one", [{"text": "good"}], attention=True)


def test_the_best_source_continues_training_and_the_choice_is_logged(
    ragged: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    result = composed(ragged, "films", "continued", name="best")
    lines = [
        record.getMessage()
        for record in caplog.records
        if record.name in ("fusion.analysis.probe", "fusion.analysis.initialization")
    ]
    scores = {line.split()[2].rstrip(":"): float(line.split()[-1]) for line in lines[:-1]}
    assert list(scores) == NAMES and all(line.startswith("probe of ") for line in lines[:-1])
    manifest = load("best", ragged.folder / "store").manifest
    assert manifest.composition is not None
    chosen = manifest.composition.continued
    assert chosen == max(scores, key=scores.__getitem__)
    assert lines[-1].startswith(f"continuing training of {chosen}: ")
    assert result["sources"] == [source.name for source in manifest.sources] == NAMES
    layers = {key.split(".")[0] for key in ragged.weights("best")}
    assert layers == {key.split(".")[0] for key in ragged.weights(chosen)}
    check_reproduced(ragged, "best", result)


@pytest.mark.parametrize(
    ("scores", "best"), [([0.1, 0.7, 0.2], "books"), ([0.1, 0.7, 0.7], "books"), ([0.1, 0.2, 0.3], "plays")]
)
def test_continued_selects_the_first_of_equally_good_sources(
    ragged: Bench, monkeypatch: pytest.MonkeyPatch, scores: list[float], best: str
) -> None:
    monkeypatch.setattr("fusion.analysis.initialization.probe", lambda *_: scores)
    composed(ragged, "films", "continued", name="decided", overwrite=True)
    manifest = load("decided", ragged.folder / "store").manifest
    assert manifest.composition is not None and manifest.composition.continued == best
    begun, ended = ragged.weights(best), ragged.weights("decided")
    assert {key: value.shape for key, value in ended.items()} == {key: v.shape for key, v in begun.items()}
    moved = [(ended[key] - begun[key]).abs().max() for key in begun]
    assert 0 < max(moved) < 0.1  # close to the source's weights


# --- pruned ----------------------------------------------------------------------------------------


def prune(bench: Bench, name: str, keep: int, sources: list[str] | None = None, **changes: Any) -> Any:
    task, fusion = changes.pop("task", "films"), changes.pop("fusion", "films-adapterfusion")
    return composed(bench, task, "pruned", sources or [], name=name, fusion=fusion, keep=keep, **changes)


def test_a_pruned_fusion_is_the_stored_one_with_its_most_attended_sources(ragged: Bench) -> None:
    result = prune(ragged, "two", 2)
    assert (result["parameters"]["trainable"], result["best_epoch"], result["epochs"]) == (0, 0, 0)
    assert result["sources"] == NAMES
    store = ragged.folder / "store"
    fusion, pruned = load("films-adapterfusion", store), load("two", store)
    assert same(fusion.weights, pruned.weights) and same(fusion.head, pruned.head)
    assert pruned.manifest.kind == "fusion" and pruned.manifest.sources == fusion.manifest.sources
    assert pruned.manifest.head == fusion.manifest.head and pruned.manifest.head.layers == 2
    assert pruned.manifest.composition is not None
    kept = pruned.manifest.composition.kept
    assert kept is not None and list(kept) == ["0.feedforward", "1.feedforward", "2.feedforward"]
    assert kept["2.feedforward"] == [0, 2]  # books has no adapter there
    rows = [json.loads(line) for line in (ragged.folder / "data/films/train.jsonl").read_text().splitlines()]
    lines = ragged.predict("films-adapterfusion", rows, attention=True)
    lengths = [len(row["text"].split()) + 2 for row in rows]
    for layer in ("0", "1"):
        means = [
            sum(line["attention"][layer][name] * n for line, n in zip(lines, lengths, strict=True)) for name in NAMES
        ]
        least = means.index(min(means))
        assert kept[f"{layer}.feedforward"] == [n for n in range(3) if n != least]
    check_reproduced(ragged, "two", result)
    (line,) = ragged.predict("two", [{"text": "a good film"}], attention=True)
    for layer, seen in line["attention"].items():
        assert list(seen) == NAMES and sum(seen.values()) == pytest.approx(1, abs=1e-5)
        assert [n for n, name in enumerate(NAMES) if seen[name] > 0] == kept[f"{layer}.feedforward"]


def test_removing_one_source_equals_masking_it(ragged: Bench) -> None:
    """Where the same source is dropped in all slots, masking it does the same."""
    store = ragged.folder / "store"
    whole = stored_model(load("films-adapterfusion", store), store, load_backbone(str(ragged.backbone)))
    shutil.copytree(store / "films-adapterfusion", ragged.folder / "edited")
    file = ragged.folder / "edited" / "manifest.json"
    content = json.loads(file.read_text())
    content["composition"] |= {"name": "pruned", "keep": 1, "kept": {f"{n}.feedforward": [0, 1] for n in (0, 1)}}
    content["composition"]["kept"]["2.feedforward"] = [0]
    write_manifest(file, content)
    pruned = stored_model(load(str(ragged.folder / "edited"), store), store, load_backbone(str(ragged.backbone)))
    with torch.no_grad():
        found, masked = pruned(IDS, MASK), whole(IDS, MASK, sources_on=torch.tensor([True, True, False]))
        assert not torch.allclose(found, whole(IDS, MASK), atol=1e-5)
    torch.testing.assert_close(found, masked, rtol=0, atol=1e-5)


def test_a_pruned_fusion_can_be_fine_tuned(ragged: Bench) -> None:
    result = prune(ragged, "further", 1, train=True, task="plays")
    assert result["epochs"] == 2 and result["parameters"]["trainable"] > 0
    assert ragged.weights("further").keys() == ragged.weights("films-adapterfusion").keys()
    changed = {
        key.rpartition("feedforward.")[2]
        for key, value in ragged.weights("further").items()
        if not torch.equal(value, ragged.weights("films-adapterfusion")[key])
    }
    assert "value.weight" in changed
    manifest = load("further", ragged.folder / "store").manifest
    assert {len(kept) for kept in manifest.content["composition"]["kept"].values()} == {1}
    check_reproduced(ragged, "further", result)


def test_a_pruned_fusion_keeps_the_settings_of_its_fusion(ragged: Bench) -> None:
    settings: dict[str, Any] = {"rank": 3, "temperature": 2.0, "layers": [1, 2], "target_adapter": True}
    composed(ragged, "films", "adapterfusion", name="special", **settings)
    result = prune(ragged, "special-two", 2, fusion="special")
    composition = load("special-two", ragged.folder / "store").manifest.content["composition"]
    assert {key: composition[key] for key in settings} == settings
    assert same(ragged.weights("special"), ragged.weights("special-two"))
    check_reproduced(ragged, "special-two", result)


def test_a_replaced_fusion_changes_the_identity_of_its_pruned_one(ragged: Bench) -> None:
    composed(ragged, "films", "adapterfusion", name="moving")
    first = prune(ragged, "of-moving", 1, fusion="moving")
    assert prune(ragged, "of-moving", 1, fusion="moving") == first  # done already
    composed(ragged, "films", "adapterfusion", name="moving", seed=7, overwrite=True)
    with pytest.raises(UserError, match=r"inputs\.fusion"):
        prune(ragged, "of-moving", 1, fusion="moving")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fusion": "films"},
            r"composition\.fusion=films is a stored adapter .*expected a fusion of composition=adapter",
        ),
        ({"fusion": "by-mean"}, r"composition\.fusion=by-mean is a stored fusion \(mean\), expected a fusion"),
        ({"fusion": "filns-adapterfusion"}, "did you mean films-adapterfusion"),
        ({"fusion": None}, r"composition=pruned: expected composition\.fusion=NAME"),
        ({"keep": 0}, r"composition\.keep=0: expected a whole number >= 1"),
        ({"keep": None}, r"composition=pruned: expected .* composition\.keep=K"),
        ({"keep": 3}, r"composition\.keep=3: films-adapterfusion has 3 sources, expected fewer"),
        ({"sources": ["films", "plays"]}, r"films-adapterfusion has the sources films, books, plays; remove sources="),
        ({"rank": 3}, r"composition\.rank: composition=pruned takes them from composition\.fusion=films-adapterfusion"),
        ({"target_adapter": True}, r"composition\.target_adapter: composition=pruned"),
        ({"temperature": 2.0, "layers": [1]}, r"composition\.temperature, composition\.layers: composition=pruned"),
        ({"head": HeadConfig(layers=2)}, r"head: composition=pruned takes"),
    ],
)
def test_invalid_pruning_is_refused_in_one_line(ragged: Bench, changes: dict[str, Any], message: str) -> None:
    if changes.get("fusion") == "by-mean":
        composed(ragged, "films", "mean", name="by-mean")
    with pytest.raises(UserError, match=message) as error:
        prune(ragged, "refused", **({"keep": 1} | changes))
    assert len(str(error.value).splitlines()) == 1
    assert not (ragged.folder / "store" / "refused").exists()


def test_sources_may_be_repeated_and_a_head_of_other_labels_is_refused(ragged: Bench) -> None:
    assert prune(ragged, "named", 1, sources=NAMES)["sources"] == NAMES
    other = dataclasses.replace(ragged.tasks["films"], labels=["no", "yes"])
    ragged.tasks["other"] = other
    with pytest.raises(UserError, match=r"labels \[no,yes\], expected \[bad,good\]"):
        prune(ragged, "refused", 1, task="other")


# --- kinds of tasks, settings, old manifests ---------------------------------------------------------


def choice_row(draw: random.Random) -> dict[str, Any]:
    choices = ["a bad film", "poor it is bad", "he hated it", "a bad dog"][: draw.randrange(1, 5)]
    right = draw.randrange(len(choices) + 1)
    choices.insert(right, "a good film")
    return {"question": "which film", "choices": choices, "label": right}


def rating_row(draw: random.Random) -> dict[str, Any]:
    good = draw.randrange(4)
    return {"one": " ".join(["good"] * good + ["bad"] * (3 - good)), "two": "film", "score": float(good)}


@pytest.mark.parametrize("kind", ["choice", "regression"])
def test_choices_and_regressions_continue_training_and_are_pruned(ragged: Bench, kind: str) -> None:
    draw, row = random.Random(0), choice_row if kind == "choice" else rating_row
    splits = {"train": [row(draw) for _ in range(40)], "validation": [row(draw) for _ in range(12)]}
    write_rows(ragged.folder / "data" / kind, splits)
    ragged.tasks[kind] = (
        TaskConfig(name=kind, kind=kind, text="question", choices="choices", metrics=["accuracy"])
        if kind == "choice"
        else TaskConfig(name=kind, kind=kind, text=["one", "two"], label="score", metrics=["pearson"])
    )
    for name in ("continued", "sequence"):
        check_reproduced(ragged, f"{kind}-{name}", composed(ragged, kind, name))
    composed(ragged, kind, "adapterfusion")
    result = prune(ragged, f"{kind}-pruned", 1, task=kind, fusion=f"{kind}-adapterfusion")
    check_reproduced(ragged, f"{kind}-pruned", result)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"composition\.rank=0: expected a whole number >= 1"),
        ({"name": "mean", "rank": 2}, r"composition\.rank=2: composition=mean has no such setting"),
        ({"train": True}, r"composition\.train=true: .* use composition=average or pruned"),
        ({"fusion": "x"}, r"composition\.fusion=x: .* use composition=pruned"),
        ({"name": "mean", "keep": 2}, r"composition\.keep=2: .* use composition=pruned"),
        ({"name": "scalern"}, "expected one of adapterfusion, sequence"),
    ],
)
def test_settings_without_effect_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        CompositionConfig(**settings)
    assert len(str(error.value).splitlines()) == 1


def test_sources_are_excluded_for_a_pruned_fusion_only(ragged: Bench) -> None:
    with pytest.raises(UserError, match="sources is empty"):
        Stage2Config(task=ragged.tasks["films"])
    Stage2Config(task=ragged.tasks["films"], composition=CompositionConfig("pruned", fusion="x", keep=1))


def test_newer_settings_are_in_a_manifest_only_if_they_are_set() -> None:
    first = {"name", "value_matrix", "temperature", "dropout", "value_penalty", "layers"}
    assert set(CompositionConfig().as_stored()) == first
    assert set(CompositionConfig(rank=4, target_adapter=True).as_stored()) == first | {"rank", "target_adapter"}
    for settings in (CompositionConfig(), CompositionConfig("average", train=True, layers=[1])):
        assert CompositionConfig(**settings.as_stored()) == settings
    assert {"fusion", "keep"} < set(TRAINING_ONLY) and "kept" not in TRAINING_ONLY


def test_a_manifest_of_an_earlier_version_is_read_and_keeps_its_hash(ragged: Bench) -> None:
    manifest = load("films-adapterfusion", ragged.folder / "store").manifest
    assert manifest.content["composition"] == {
        "name": "adapterfusion",
        "value_matrix": True,
        "temperature": 1.0,
        "dropout": 0.0,
        "value_penalty": 0.01,
        "layers": None,
    }


def test_attention_of_one_adapter_is_refused_before_anything_is_read(ragged: Bench, tmp_path: Path) -> None:
    composed(ragged, "films", "continued", ["films"], name="single")
    config = PredictConfig(
        artifact="single", store=str(ragged.folder / "store"), input="none.jsonl", output="x", attention=True
    )
    with pytest.raises(UserError, match="leave attention= out"):
        predict.check(config, ragged.run("predict", config))


@pytest.mark.parametrize("name", ["sequence", "scalearn_pp", "average", "continued"])
def test_two_sites_and_mixed_precision(tiny_backbone: Path, tmp_path: Path, name: str) -> None:
    bench = Bench(tmp_path / "a folder", tiny_backbone)
    placement = AdapterConfig(name="houlsby", sites=["attention", "feedforward"], reads="output", layers="last:2")
    for task in ("films", "books"):
        bench.stage1(task, adapter=placement)
    mixed = TrainerConfig(accelerator="cpu", max_epochs=1, precision="bf16-mixed", enable_progress_bar=False)
    composed(bench, "plays", name, ["films", "books"], trainer=mixed, target_adapter=True)
    slots = {key.rpartition(".target.")[0] for key in bench.weights(f"plays-{name}") if ".target." in key}
    assert slots == {f"{layer}.{site}" for layer in (1, 2) for site in placement.sites}
    if name == "scalearn_pp":  # one scale a site
        scales = {key for key in bench.weights(f"plays-{name}") if key.endswith("scales")}
        assert scales == {f"1.{site}.composition.scales" for site in placement.sites}
    assert {tensor.dtype for tensor in bench.weights(f"plays-{name}").values()} == {torch.float32}
    assert 0 <= bench.evaluate(f"plays-{name}")["metrics"]["validation"]["accuracy"] <= 1


def test_a_resumed_run_uses_the_stored_selection(alike: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    best = [[0.9, 0.1], [0.1, 0.9]]
    monkeypatch.setattr("fusion.analysis.initialization.probe", lambda *_: best.pop(0))
    trained = TaskModule.training_step

    def broken(*_: Any) -> Any:
        raise RuntimeError("the power went off")

    monkeypatch.setattr(TaskModule, "training_step", broken)
    with pytest.raises(RuntimeError, match="the power went off"):
        composed(alike, "films", "continued", ["films", "books"], name="chosen")
    monkeypatch.setattr(TaskModule, "training_step", trained)
    composed(alike, "films", "continued", ["films", "books"], name="chosen")
    manifest = load("chosen", alike.folder / "store").manifest
    assert manifest.composition is not None and manifest.composition.continued == "films"
    assert best == [[0.1, 0.9]]  # the second one is not used


def test_a_source_of_another_store_is_copied_to_the_store_of_the_fusion(bench: Bench) -> None:
    bench.stage1("films")
    path = str(bench.folder / "store" / "films")
    another = bench.folder / "another"
    result = bench.stage2("plays", [path], store=str(another))
    (copied,) = (another / ".replaced").iterdir()
    assert sorted(p.name for p in copied.iterdir()) == sorted(p.name for p in Path(path).iterdir())
    assert not list((another / ".staging").iterdir())
    shutil.rmtree(path)  # the other store may go
    again = bench.evaluate(str(another / "plays-adapterfusion"))["metrics"]["validation"]
    assert again == pytest.approx(result["metrics"]["validation"], abs=1e-6)

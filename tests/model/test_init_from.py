"""`init_from`: training starts from stored weights of the same shape, and anything else is refused."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fusion.config.compositions import CompositionConfig
from fusion.config.methods import MethodConfig
from fusion.config.model import AdapterConfig, HeadConfig
from fusion.config.stages import Stage1Config, Stage2Config
from fusion.config.training import OptimConfig
from fusion.errors import UserError
from fusion.runs.identity import identity, name_conflict
from fusion.stages.stage1 import check_stage1
from fusion.stages.stage2 import check_stage2
from fusion.store.listing import describe, rebuild_lines
from fusion.store.lookup import read_manifest
from tests.bench import Bench

STILL = OptimConfig(lr=1e-30, weight_decay=0.0, patience=None)  # trains, and moves nothing


def head_of(bench: Bench, name: str) -> dict[str, torch.Tensor]:
    return load_file(bench.folder / "store" / name / "head.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_starts_from_another(bench: Bench) -> None:
    first = bench.stage1("films")
    again = bench.stage1("films", name="again", init_from="films", optim=STILL)
    assert same(bench.weights("again"), bench.weights("films"))
    assert same(head_of(bench, "again"), head_of(bench, "films"))
    assert again["metrics"] == first["metrics"]
    origin = read_manifest("films", bench.folder / "store")
    stored = read_manifest("again", bench.folder / "store").content["run"]
    assert stored["init_from"] == {"name": "films", "hash": origin.hash}
    assert stored["config"]["init_from"] == "films"
    assert stored["config"]["inputs.init_from"][0] == origin.hash
    other = bench.stage1("books", name="fresh-head", init_from="films", optim=STILL, head=HeadConfig(layers=2))
    assert other["metrics"].keys() == {"validation"}
    assert same(bench.weights("fresh-head"), bench.weights("films"))


def test_the_store_shows_the_initialization_and_the_commands_of_both(bench: Bench) -> None:
    bench.stage1("films")
    bench.stage1("films", name="again", init_from="films")
    store = bench.folder / "store"
    stored, origin = read_manifest("again", store), read_manifest("films", store)
    words = ["+task=films", "init_from=../elsewhere/films"]
    typed = stored.changed(run=stored.content["run"] | {"overrides": words, "folder": None})
    _, first, second = rebuild_lines(typed, store, store)
    assert first.startswith("# films was not created by a command")
    assert "python -m fusion.stage1 +task=films init_from=films " in second and " name=again " in second
    line = f"init_from     films {origin.hash}, "
    assert f"{line}found: {store / 'films'}" in describe("again", store)
    shutil.rmtree(store / "films")
    assert f"{line}NOT FOUND" in describe("again", store)
    gone = f"# source films ({origin.hash[:8]}) not found"
    assert rebuild_lines(typed, store, store)[0].startswith(gone)


@pytest.mark.parametrize("method", ["head", "lora", "bitfit", "full"])
def test_every_method_starts_from_its_own(bench: Bench, method: str) -> None:
    first = bench.stage1("films", method=MethodConfig(method))
    again = bench.stage1("films", method=MethodConfig(method), name="again", init_from=f"films-{method}", optim=STILL)
    assert same(bench.weights("again"), bench.weights(f"films-{method}"))
    assert same(head_of(bench, "again"), head_of(bench, f"films-{method}"))
    assert again["metrics"] == first["metrics"]


@pytest.mark.parametrize("method", ["multitask_adapter", "multitask_full"])
def test_multiple_tasks_start_from_the_same_tasks(bench: Bench, method: str) -> None:
    first = bench.multitask("films", "books", method=MethodConfig(method), name="first")
    again = bench.multitask("films", "books", method=MethodConfig(method), name="again", init_from="first", optim=STILL)
    for name, tensor in bench.weights("first").items():  # a zero moves by the learning rate
        torch.testing.assert_close(bench.weights("again")[name], tensor, rtol=0, atol=1e-28)
    assert same(head_of(bench, "again"), head_of(bench, "first"))
    assert again["metrics"] == first["metrics"]


def test_a_fusion_starts_from_another(bench: Bench) -> None:
    bench.stage1("films")
    bench.stage1("books")
    bench.stage2("plays", ["films", "books"])
    bench.stage2("plays", ["films", "books"], name="again", init_from="plays-adapterfusion", optim=STILL)
    assert same(bench.weights("again"), bench.weights("plays-adapterfusion"))
    assert same(head_of(bench, "again"), head_of(bench, "plays-adapterfusion"))

    def check(sources: list[str], **changes: Any) -> None:
        config = Stage2Config(
            **bench.settings("plays", **changes), sources=sources, init_from="plays-adapterfusion", name="other"
        )
        check_stage2(config, bench.run("stage2", config))

    check(["films", "books"])
    with pytest.raises(UserError, match=r"settings of this run: sources .*books \w{8}.*, expected .*films \w{8}"):
        check(["books", "films"])
    with pytest.raises(UserError, match=r"composition\.value_matrix false, expected true"):
        check(["films", "books"], composition=CompositionConfig(value_matrix=False))
    with pytest.raises(UserError, match="starts from its sources; remove init_from"):
        check(["films", "books"], composition=CompositionConfig(name="average"))


def test_an_incompatible_initialization_is_refused(bench: Bench) -> None:
    bench.stage1("films")
    bench.stage1("films", method=MethodConfig("head"))

    def check(**changes: Any) -> None:
        config = Stage1Config(**bench.settings("films", **({"name": "other", "init_from": "films"} | changes)))
        check_stage1(config, bench.run("stage1", config))

    check()
    with pytest.raises(UserError, match=r"adapter\.bottleneck_size 4, expected 2"):
        check(adapter=AdapterConfig(reduction_factor=8))
    with pytest.raises(UserError, match=r"adapter\.nonlinearity gelu, expected relu; set the expected values"):
        check(adapter=AdapterConfig(nonlinearity="gelu"))
    with pytest.raises(UserError, match="is a stored head, but this run trains a adapter"):
        check(init_from="films-head")
    with pytest.raises(UserError, match="nothing"):
        check(init_from="nothing")


def test_identity(bench: Bench) -> None:
    def of(**changes: Any) -> dict[str, Any]:
        return bench.run("stage1", Stage1Config(**bench.settings("films", **changes))).config

    plain = of()
    assert identity({key: value for key, value in plain.items() if key != "init_from"}) == identity(plain)
    assert identity(of(init_from="films")) != identity(plain)


def test_more_epochs_are_refused_with_the_reason(bench: Bench) -> None:
    bench.stage1("films")
    more = dataclasses.replace(bench.settings("films")["trainer"], max_epochs=4)
    with pytest.raises(UserError) as caught:
        bench.stage1("films", trainer=more)
    message = str(caught.value)
    assert "trainer.max_epochs: 2 stored, 4 now" in message and "decayed to zero" in message
    assert "name=NAME init_from=films" in message and len(message.splitlines()) == 2
    bench.stage1("films", trainer=more, name="more", init_from="films")


@pytest.mark.parametrize("now", [{"trainer.max_epochs": 20, "seed": 1}, {"trainer.max_epochs": 5, "seed": 2}])
def test_another_seed_and_fewer_epochs_are_other_settings(now: dict[str, int]) -> None:
    message = str(name_conflict("rte", {"trainer.max_epochs": 10, "seed": 2}, now))
    assert "Set name=NAME to keep both" in message

"""`search=true` in both stages: the grid, the selection, its record, and continuing after an interruption."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fusion.config.fields import MAX_SEED
from fusion.config.stages import Stage1Config
from fusion.config.task import TaskConfig
from fusion.config.training import OptimConfig
from fusion.errors import TrainingError, UserError
from fusion.stages import search as searching
from fusion.store.lookup import names, read_manifest
from fusion.training.predictions import main_score
from tests.bench import Bench, same

RATES = [1e-9, 2e-2]


def grid(rates: list[float]) -> dict[str, Any]:
    return {"search": True, "search_rates": rates, "optim": OptimConfig(patience=None)}


def test_the_best_rate_and_seed_are_kept(bench: Bench) -> None:
    store = bench.folder / "store"
    result = bench.stage1("films", **grid(RATES), search_seeds=2)
    found = result["search"]
    assert set(found) == {"rates", "chosen", "trainings", "seconds"} and found["trainings"] == 4
    assert [(one["lr"], one["seeds"]) for one in found["rates"]] == [(1e-9, [42, 43]), (2e-2, [42, 43])]
    means = {one["lr"]: sum(one["scores"]) / 2 for one in found["rates"]}
    assert found["chosen"]["lr"] == max(means, key=lambda rate: means[rate]) == 2e-2
    (best,) = [one for one in found["rates"] if one["lr"] == 2e-2]
    assert found["chosen"]["seed"] == best["seeds"][best["scores"].index(max(best["scores"]))]
    assert names(store) == ["films"] and result["name"] == "films"
    assert result["metrics"]["validation"]["accuracy"] == max(best["scores"])
    manifest = read_manifest("films", store)
    assert manifest.seed == found["chosen"]["seed"] and manifest.run.config["search"] is True
    assert manifest.content["result"]["search"] == found
    again = bench.stage1("films", **grid(RATES), search_seeds=2)
    assert again == result
    alone = bench.stage1("films", name="alone", optim=OptimConfig(lr=2e-2, patience=None), seed=manifest.seed)
    assert same(bench.weights("alone"), bench.weights("films")) and alone["metrics"] == result["metrics"]
    evaluated = bench.evaluate("films", split="validation")["metrics"]
    assert evaluated["validation"] == pytest.approx(result["metrics"]["validation"], abs=1e-6)
    with pytest.raises(UserError, match="the store already contains a different films"):
        bench.stage1("films")
    fused = bench.stage2("plays", ["films"], **grid([1e-3, 1e-2]))
    assert fused["search"]["trainings"] == 2 and fused["sources"] == ["films"]
    assert read_manifest("plays-adapterfusion", store).sources[0].hash == manifest.hash


def test_an_interrupted_search_continues(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    candidates = searching.candidates_of

    def cut(config: Stage1Config) -> list[Stage1Config]:
        every = candidates(config)
        every.insert(1, every[1].__class__(**vars(every[1]) | {"search": True, "name": "broken"}))
        return every

    monkeypatch.setattr(searching, "candidates_of", cut)
    record = searching.record

    def spy(run: Any, work: Any) -> dict[str, Any]:
        if run.config["name"] == "broken":
            raise KeyboardInterrupt
        trained.append(run.config["name"])
        return record(run, work)

    monkeypatch.setattr(searching, "record", spy)
    with pytest.raises(KeyboardInterrupt):
        bench.stage1("films", **grid(RATES))
    assert names(bench.folder / "store") == ["films-lr-1e-09-seed-42"]
    monkeypatch.setattr(searching, "candidates_of", candidates)
    before = bench.weights("films-lr-1e-09-seed-42")
    bench.stage1("films", **grid(RATES))
    assert trained == ["films-lr-1e-09-seed-42", "films-lr-1e-09-seed-42", "films-lr-0.02-seed-42"]
    assert before and names(bench.folder / "store") == ["films"]


def test_failed_trainings_are_left_out(bench: Bench) -> None:
    result = bench.stage1(
        "films", search=True, search_rates=[999.0, 5e-3], optim=OptimConfig(warmup=0.0, patience=None)
    )
    assert result["search"]["chosen"]["lr"] == 5e-3
    with pytest.raises(TrainingError, match="none of the 1 trainings of the search succeeded; lower search_rates"):
        optim = OptimConfig(warmup=0.0, patience=None)
        bench.stage1("books", search=True, search_rates=[999.0], optim=optim)


def test_the_default_grid_and_invalid_settings(bench: Bench) -> None:
    settings = bench.settings("films")
    assert Stage1Config(**settings, search=True).rates_to_search == [0.0017, 0.005, 0.015]
    for wrong in ([], [0], [1e-3, 1e-3], "1e-3", [True]):
        with pytest.raises(UserError, match=r"search_rates=.*: expected distinct numbers > 0"):
            Stage1Config(**settings, search=True, search_rates=wrong)
    with pytest.raises(UserError, match=r"optim.lr=0.005: search_rates are the learning rates; leave one of them out"):
        Stage1Config(**settings, search=True, search_rates=[1e-3])
    with pytest.raises(UserError, match="search_rates and search_seeds: have no effect without search=true"):
        Stage1Config(**settings, search_seeds=2)
    assert MAX_SEED > 42


def test_the_main_score_is_the_mean_over_tasks() -> None:
    films = TaskConfig(name="films", text="x", labels=["a", "b"], metrics=["accuracy", "f1"])
    books = TaskConfig(name="books", text="x", labels=["a", "b"], metrics=["f1"])
    assert main_score({"validation": {"accuracy": 0.5, "f1": 0.9}}, [films]) == 0.5
    both = {"films/validation": {"accuracy": 0.5, "f1": 0.9}, "books/a": {"f1": 0.7}, "books/b": {"f1": 0.1}}
    assert main_score(both, [films, books]) == pytest.approx(0.6)


def test_runs_of_the_search_have_folders(bench: Bench) -> None:
    bench.stage1("films", **grid(RATES))
    folders = sorted((bench.folder / "runs" / str(bench.runs) / "search").iterdir())
    assert [folder.name for folder in folders] == ["films-lr-0.02-seed-42", "films-lr-1e-09-seed-42"]
    assert all(json.loads((folder / "status.json").read_text())["status"] == "done" for folder in folders)

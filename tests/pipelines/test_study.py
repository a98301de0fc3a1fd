"""The study of fusion with few labels: its splits, the order of its trainings, its results and tables."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from fusion.data.rows import Rows
from fusion.errors import UserError
from fusion.locks import LOCKS, lock
from fusion.store.lookup import names
from pipelines.study import trainings
from pipelines.study.__main__ import main
from pipelines.study.config import METHODS, SELECTED, SELECTED_FROM, StudyConfig
from pipelines.study.results import Cell, append_results, best_rate, read_results
from pipelines.study.table import comparisons, paired_test, report, scores_of
from pipelines.study.trainings import Study

Results = dict[Cell, dict[str, Any]]
SCORES = {"head": 0.6, "adapter": 0.7, "fusion": 0.8, "lora": 0.7, "lora_flow": 0.8}


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    return StudyConfig(
        targets=["sst2", "cb"],
        sources=["mr", "snli", "cb"],
        rows=[100],
        seeds=[1, 2],
        methods=["head", "fusion"],
        output=str(tmp_path / "study"),
        results=str(tmp_path / "results" / "study.jsonl"),
    )


def result(cell: Cell, validation: float, test: float) -> dict[str, Any]:
    return {**cell._asdict(), "settings": "", "metric": "accuracy", "validation": validation, "test": test}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """The commands that a study runs, which leave the result of each job."""
    calls: list[tuple[str, list[str]]] = []

    def values(words: list[str]) -> dict[str, str]:
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def run(module: str, words: Any) -> None:
        calls.append((module, list(words)))
        given = values(list(words))
        if "hydra.sweep.dir" not in given:
            (Path(given["store"]) / given["name"]).mkdir(parents=True)
            (Path(given["store"]) / given["name"] / "manifest.json").write_text("{}")
            return
        runs, store = Path(given["hydra.sweep.dir"]), Path(given["store"])
        if module == "fusion.evaluate":
            for name in given["artifact"].split(","):
                folder = runs / f"{name}-test"
                folder.mkdir(parents=True)
                score = SCORES[name.split("-")[2]]
                made = {"metrics": {"test": {"accuracy": score, "f1": 0.1}}, "rows": 50}
                (folder / "result.json").write_text(json.dumps(made))
            return
        for seed in given["seed"].split(","):
            for rate in given["optim.lr"].split(","):
                name = given["name"].replace("${seed}", seed).replace("${optim.lr}", str(float(rate)))
                (store / name).mkdir(parents=True, exist_ok=True)
                (store / name / "manifest.json").write_text("{}")
                (runs / name).mkdir(parents=True, exist_ok=True)
                made = {
                    "metrics": {"validation": {"accuracy": 0.5 + float(rate)}},
                    "best_epoch": 2,
                    "speed": {"seconds": 3.21},
                    "parameters": {"trainable": 7},
                }
                (runs / name / "result.json").write_text(json.dumps(made))

    monkeypatch.setattr(trainings, "run", run)
    monkeypatch.setattr(trainings, "write_splits", lambda config, task: None)
    return calls


def test_the_order_of_the_trainings(
    config: StudyConfig, trained: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = Study(config)
    done.run()
    shown = []
    for module, words in trained:
        of = dict(word.partition("=")[::2] for word in words if "=" in word)
        if module != "fusion.evaluate":
            shown.append((of["+task"], of.get("seed"), of["optim.lr"], of.get("sources"), of.get("method")))
    own = "{}-100-adapter-lr-0.002-seed-${{seed}}"
    assert shown == [
        *((source, None, "1e-3", None, None) for source in ("cb", "mr", "snli")),
        ("sst2", "1", "0.0005,0.001,0.002", None, None),
        ("cb", "1", "0.0005,0.001,0.002", None, None),
        ("sst2", "2", "0.002", None, None),
        ("cb", "2", "0.002", None, None),
        ("sst2", "1", "0.002,0.005,0.02", None, "head"),
        ("cb", "1", "0.002,0.005,0.02", None, "head"),
        ("sst2", "2", "0.02", None, "head"),
        ("cb", "2", "0.02", None, "head"),
        ("sst2", "1", "0.0001,0.0002,0.0005", f"[snli,cb,{own.format('sst2')}]", None),
        ("cb", "1", "0.0001,0.0002,0.0005", f"[mr,snli,{own.format('cb')}]", None),
        ("sst2", "2", "0.0005", f"[snli,cb,{own.format('sst2')}]", None),
        ("cb", "2", "0.0005", f"[mr,snli,{own.format('cb')}]", None),
    ]
    results = read_results(config)
    assert results == done.results and len(results) == 2 * (4 + 4 + 4)
    first = results[Cell("minilm", "sst2", 100, "head", 1, 0.002)]
    assert first == {
        "backbone": "minilm", "target": "sst2", "rows": 100, "method": "head", "seed": 1, "rate": 0.002,
        "settings": config.fingerprint("head"), "metric": "accuracy", "validation": 0.502, "test": 0.6, "metrics": {"accuracy": 0.6, "f1": 0.1},
        "test_examples": 50, "best_epoch": 2, "seconds": 3.2, "trainable": 7,
    }  # fmt: skip
    kept = {folder.name for folder in config.store.iterdir() if folder.name != LOCKS}
    assert all("adapter" in name for name in kept - {"cb", "mr", "snli"})
    trained.clear()
    Study(config).run()
    assert trained == []
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "head", METHODS["head"]._replace(overrides="method=head head.dropout=0.1"))
        assert {cell.method for cell in read_results(config)} == {"adapter", "fusion"}
        patch.setitem(METHODS, "adapter", METHODS["adapter"]._replace(overrides="adapter.reduction=8"))
        assert read_results(config) == {}  # the fusion has the adapter among its sources
    config.validation_rows += 1
    assert read_results(config) == {}


def test_sources_that_are_loras(config: StudyConfig, trained: list[tuple[str, list[str]]]) -> None:
    config.methods, config.targets, config.seeds = ["lora", "lora_flow"], ["sst2"], [1]
    Study(config).run()
    words = [words for module, words in trained if module != "fusion.evaluate"]
    for source, given in zip(("cb", "snli"), words, strict=False):
        assert {f"+task={source}", f"name={source}-lora", "method=lora", "optim.lr=2e-3"} <= set(given)
    assert len(words) == 2 + 2 and "sources=[snli-lora,cb-lora]" in words[-1] and "composition=lora_flow" in words[-1]
    assert {name for name in names(config.store) if not name.startswith("sst2")} == {"cb-lora", "snli-lora"}
    before = config.fingerprint("lora_flow"), config.fingerprint("fusion")
    config.lora_overrides.append("method.rank=4")
    assert (config.fingerprint("lora_flow") != before[0], config.fingerprint("fusion")) == (True, before[1])


def test_folds_are_trained_before_a_cross_fitted_fusion(
    config: StudyConfig, trained: list[tuple[str, list[str]]]
) -> None:
    config.methods, config.targets, config.seeds = ["fusion_cross_fit"], ["sst2"], [1]
    SCORES["fusion_cross_fit"] = 0.9
    Study(config).run()
    folds = [words for _, words in trained if "data.leave_out=0/4,1/4,2/4,3/4" in words]
    assert len(folds) == 1 and "name=sst2-100-adapter-lr-0.002-seed-${seed}" in folds[0]


def test_the_rate_is_selected_on_validation_over_complete_targets(config: StudyConfig) -> None:
    results = {}
    for target, scores in (("sst2", (0.5, 0.9, 0.7)), ("cb", (0.9, 0.4, 0.8))):
        for rate, score in zip((2e-3, 5e-3, 2e-2), scores, strict=True):
            cell = Cell("minilm", target, 100, "head", 1, rate)
            results[cell] = result(cell, score, 1 - score)
    assert best_rate(results, config, 100, "head") == 2e-2
    del results[Cell("minilm", "cb", 100, "head", 1, 2e-3)]
    assert best_rate(results, config, 100, "head") == 5e-3
    assert best_rate({}, config, 100, "head") == 5e-3


def with_results(config: StudyConfig, gains: dict[str, dict[str, float]], backbone: str = "minilm") -> Results:
    """Scores of five seeds with the middle rate, and lower validation scores with the other rates."""
    results = {}
    for target, own in gains.items():
        for method, gain in own.items():
            rates = METHODS[method].rates
            for seed in config.seeds:
                for rate in rates if seed == 1 else rates[1:2]:
                    cell = Cell(backbone, target, 100, method, seed, rate)
                    score = 0.6 + 0.01 * seed + gain + (0.001 * (seed % 2) if method != "adapter" else 0.0)
                    results[cell] = result(cell, score if rate == rates[1] else 0.1, score)
    return results


def test_comparisons_are_paired_by_seed(config: StudyConfig) -> None:
    config.seeds, config.methods = [1, 2, 3, 4, 5], ["adapter", "fusion"]
    results = with_results(config, {"sst2": {"adapter": 0, "fusion": 0.05}, "cb": {"adapter": 0, "fusion": -0.01}})
    found = {(one.method, one.target): one for one in comparisons(results, config, 100)}
    assert set(found) == {(method, target) for method in config.methods for target in config.targets}
    one = found["fusion", "sst2"]
    assert one.difference == pytest.approx(0.0506) and len(one.scores) == 5
    test = stats.ttest_1samp([0.051, 0.05, 0.051, 0.05, 0.051], 0)  # 1, 3 and 5 have 0.001 more
    assert (one.low, one.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert one.p is not None and one.p <= 2 * test.pvalue * (1 + 1e-6) and one.verdict == "win"
    assert found["fusion", "cb"].verdict == "loss" and found["adapter", "cb"].verdict == "tie"
    del results[Cell("minilm", "cb", 100, "fusion", 3, 2e-4)]
    assert len({one.target: one for one in comparisons(results, config, 100)}["cb"].scores) == 4
    assert paired_test([0.5], [0.4]) == (None, None, None)
    assert paired_test([0.5, 0.6], [0.5, 0.6]) == (0, 0, 1) and paired_test([0.5, 0.6], [0.4, 0.5])[2] == 0


def test_the_method_is_selected_on_validation(config: StudyConfig) -> None:
    config.methods = ["adapter", "fusion_new_adapter"]
    results = with_results(config, {"sst2": {"adapter": 0.0, "fusion_new_adapter": 0.0}})
    for seed, validations in ((1, (0.7, 0.8)), (2, (0.7, 0.7))):
        for method, validation in zip(SELECTED_FROM, validations, strict=True):
            cell = Cell("minilm", "sst2", 100, method, seed, METHODS[method].rates[1])
            results[cell] = {**results[cell], "validation": validation, "test": seed + (method != "adapter") / 2}
    assert scores_of(results, config, 100, SELECTED) == {"sst2": {1: 1.5, 2: 2.0}}
    assert config.compared == ["adapter", "fusion_new_adapter", SELECTED]
    config.methods = ["adapter"]
    assert config.compared == ["adapter"]


def test_tables_and_picture(config: StudyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.seeds, config.methods = [1, 2, 3, 4, 5], ["adapter", "fusion"]
    config.results = str(tmp_path / "study.jsonl")
    results = with_results(config, {"sst2": {"adapter": 0, "fusion": 0.05}, "cb": {"adapter": 0, "fusion": -0.05}})
    results |= with_results(config, {"cb": {"adapter": 0.1}}, "mpnet_base")
    report(config, results)
    assert {path.name for path in tmp_path.iterdir()} == {"study.md", "study.png", "study.svg"}
    lines = (tmp_path / "study.md").read_text().splitlines()
    assert "### minilm, 100 training examples" in lines and "### mpnet_base, 100 training examples" in lines
    assert "| target | single adapter | fusion, as published |" in lines
    assert "| sst2 | 0.630 ± 0.016 | 0.681 ± 0.016 ▲ |" in lines
    assert "| mean difference |  | +0.001 |" in lines and "| wins / ties / losses |  | 1 / 0 / 1 |" in lines
    assert "| cb | -0.049 (-0.050 to -0.049) |" in lines
    assert "| cb | 0.730 ± 0.016 |" in lines
    assert "written: " in capsys.readouterr().out
    report(config, {})
    assert "no results yet" in capsys.readouterr().out


def test_held_out_examples(config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation examples come from train, and the test examples from the validation split, which has labels."""
    config.validation_rows = 10

    def examples(task: str, split: str, limit: int | None, data_dir: str | None) -> Rows:
        if split == "test":
            raise UserError("no test split")
        count = 50 if split == "train" else 20
        return Rows([(f"{split} {n}", "b") for n in range(count)], None, [n % 3 for n in range(count)], 0, "f")

    monkeypatch.setattr(trainings, "examples", examples)
    trainings.write_splits(config, "cb")
    lines = {
        split: [json.loads(line) for line in (config.data / "cb" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation", "test")
    }
    assert {split: len(rows) for split, rows in lines.items()} == {"train": 40, "validation": 10, "test": 20}
    assert set(lines["train"][0]) == {"premise", "hypothesis", "label"}
    texts = {split: {row["premise"] for row in rows} for split, rows in lines.items()}
    assert texts["train"] | texts["validation"] == {f"train {n}" for n in range(50)}
    assert texts["test"] == {f"validation {n}" for n in range(20)}


def test_invalid_lines_and_settings(config: StudyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(config.results)
    path.parent.mkdir(parents=True)
    path.write_text('{"backbone": "minilm"}\n')
    with pytest.raises(UserError, match=r"study.jsonl, line 1: is not a result of the study; remove the line"):
        read_results(config)
    assert main(["methods=[magic]"]) == 2
    assert "methods=[magic]: expected some of head, adapter" in capsys.readouterr().err
    assert main(["report=true", f"results={tmp_path / 'none.jsonl'}"]) == 0


def test_sources_share_no_texts_with_the_target() -> None:
    config = StudyConfig()
    assert "mr" not in config.sources_of("sst2") and "sst2" not in config.sources_of("mr")
    assert "stsb" not in config.sources_of("mrpc") and "qqp" in config.sources_of("mrpc")
    assert all(target not in config.sources_of(target) for target in config.targets)


def test_processes_share_the_work(config: StudyConfig, trained: list[tuple[str, list[str]]]) -> None:
    """Targets that another process trains come last, and are not trained again if it has added their results."""
    config.methods, config.seeds = ["head"], [1]
    path = config.store / LOCKS / "study-100-head-sst2"
    held = threading.Event()

    def other() -> None:
        with lock(path, ""):
            held.set()
            while not any("+task=cb" in words and "method=head" in words for _, words in trained):
                time.sleep(0.01)
            cells = [Cell("minilm", "sst2", 100, "head", 1, rate) for rate in (2e-3, 5e-3, 2e-2)]
            append_results(
                Path(config.results),
                [result(cell, 0.5, 0.5) | {"settings": config.fingerprint("head")} for cell in cells],
            )

    process = threading.Thread(target=other)
    process.start()
    held.wait()
    Study(config).run()
    process.join()
    heads = [words for _, words in trained if "method=head" in words]
    assert len(heads) == 1 and "+task=cb" in heads[0]
    assert len(read_results(config)) == 6


def test_own_adapters_that_are_not_in_the_store_are_trained_again(
    config: StudyConfig, trained: list[tuple[str, list[str]]]
) -> None:
    config.targets, config.seeds = ["sst2"], [1]
    Study(config).run()
    shutil.rmtree(config.store / "sst2-100-adapter-lr-0.002-seed-1")
    path = Path(config.results)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"fusion"' not in line))
    trained.clear()
    Study(config).run()
    first, second, _ = (words for _, words in trained)
    assert "optim.lr=0.002" in first and "composition=adapterfusion" in second
    assert (config.store / "sst2-100-adapter-lr-0.002-seed-1").is_dir()

"""What is printed when a command has ended; the next commands can be typed as they are."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from fusion.cli.console import number, score
from fusion.cli.finished import end_of_run, end_of_sweep, settings_table
from fusion.runs.run import Run
from fusion.runs.sweep import Job
from fusion.store.listing import as_bytes
from tests.bench import Bench, write_manifest


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Bench:
    """A store with two adapters, a head and a fusion; `results` by name."""
    bench = Bench(tmp_path_factory.mktemp("ending") / "a folder", tiny_backbone)
    for name in ("films", "books"):
        bench.result[name] = bench.stage1(name)
    bench.result["both"] = bench.stage2("films", ["films", "books"], name="both")
    return bench


def run(bench: Bench, command: str, *words: str, config: dict[str, Any] | None = None) -> Run:
    return Run(command, bench.folder / "runs" / "x y", words, config or {}, command)


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.err == "" and "\x1b" not in captured.out and captured.out.isascii()
    return captured.out.splitlines()


def typed(line: str) -> list[str]:
    """A proposed command line, split into words as by a shell."""
    mark, _, command = line.partition(": ")
    assert mark in ("next", "  or")
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"]
    return words[2:]


def test_after_stage_1(trained: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    store = trained.folder / "store"
    words = ("+task=books", f"store={store}", "data.dir=d", "optim.lr=1", "backbone=minilm", "data.limit.train=7")
    end_of_run(run(trained, "stage1", *words), trained.result["books"])
    titles, row, *following = lines_of(capsys)
    result = trained.result["books"]
    assert titles.split() == ["name", "best", "epoch", "accuracy", "macro_f1", "trained", "stored", "seconds"]
    scores = result["metrics"]["validation"]
    assert row.split() == [
        "books",
        str(result["best_epoch"]),
        f"{scores['accuracy']:.4f}",
        f"{scores['macro_f1']:.4f}",
        f"{result['parameters']['trainable']:,}",
        *as_bytes(result["parameters"]["stored_bytes"]).split(),
        f"{result['speed']['seconds']:,.1f}",
    ]
    kept = [f"store={store}", "data.dir=d"]  # with its blank
    assert [typed(line) for line in following] == [
        ["fusion.evaluate", "artifact=books", *kept],
        ["fusion.stage2", "+task=books", "sources=[books,films]", *kept, "backbone=minilm", "data.limit.train=7"],
    ]
    assert following[1].startswith("  or: ")


def test_the_backbone_of_an_experiment_is_in_the_command(trained: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    end_of_run(run(trained, "stage1", "+task=books", "experiment=quick"), trained.result["books"])
    fuse = typed(lines_of(capsys)[-1])
    quoted = f'"{trained.backbone}"' if " " in str(trained.backbone) else str(trained.backbone)
    assert fuse[-2:] == [f"backbone.name_or_path={quoted}", "backbone.pooling=mean"]


def test_stage_2_is_not_proposed_without_adapters_of_other_tasks(
    trained: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    result = with_seed(trained, store, "books", "books", 1)
    with_seed(trained, store, "books", "books-2", 2)
    end_of_run(run(trained, "stage1", "+task=books"), result)
    assert [typed(line)[0] for line in lines_of(capsys)[2:]] == ["fusion.evaluate"]


def test_next_commands_can_be_switched_off(
    trained: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSION_NEXT", "0")
    end_of_run(run(trained, "stage1", "+task=books"), trained.result["books"])
    assert [line.split()[0] for line in lines_of(capsys)] == ["name", "books"]


def test_after_stage_2(trained: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ("data.limit.train=7", "data.limit.validation=5")
    words = ("+task=films", "sources=[films,books]", "store=s", *limits)
    end_of_run(run(trained, "stage2", *words), trained.result["both"])
    following = [typed(line) for line in lines_of(capsys)[2:]]
    folder = trained.folder / "runs" / "x y"
    assert following == [
        ["fusion.evaluate", "artifact=both", "store=s", "data.limit.validation=5"],
        ["fusion.inspect", "artifact=both", "store=s", "data.limit.validation=5"],
        ["fusion.report", f'runs="{folder}"'],
    ]


def test_a_fusion_gets_an_unused_name(trained: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the default one is taken."""
    store = trained.folder / "taken"
    shutil.copytree(trained.folder / "store", store)
    with_seed(trained, store, "both", "books-adapterfusion", 1)
    result = trained.result["books"] | {"artifact": str(store / "books")}
    end_of_run(run(trained, "stage1", "+task=books"), result)
    following = [typed(line) for line in lines_of(capsys)[2:]]
    name = "name=books-adapterfusion-2"
    assert following[1] == ["fusion.stage2", "+task=books", "sources=[books,films]", name]
    ranked = {"task": {"name": "books"}, "sources": [{"name": "a"}]}
    end_of_run(run(trained, "rank", "+task=books", config={"store": str(store)}), ranked)
    (line,) = lines_of(capsys)
    assert typed(line) == ["fusion.stage2", "+task=books", "sources=top:1", "name=books-adapterfusion-2"]


def test_after_rank(trained: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    result = {"task": {"name": "films"}, "sources": [{"name": "a"}, {"name": "b"}]}
    end_of_run(run(trained, "rank", "+task=films", "sources=all", "store=s", "backbone=minilm"), result)
    (following,) = lines_of(capsys)
    assert typed(following) == ["fusion.stage2", "+task=films", "sources=top:2", "store=s", "backbone=minilm"]


def test_after_a_run_that_stored_nothing(trained: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    result = {key: value for key, value in trained.result["films"].items() if key != "artifact"}
    end_of_run(run(trained, "stage1", "trainer.fast_dev_run=true"), result)
    assert len(lines_of(capsys)) == 2


def test_after_evaluate_and_predict(
    trained: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = trained.evaluate("films")
    capsys.readouterr()
    monkeypatch.chdir(trained.folder)
    end_of_run(run(trained, "evaluate", "artifact=films"), result)
    titles, row, following = lines_of(capsys)
    assert titles.split() == ["name", "split", "accuracy", "macro_f1", "examples"]
    assert row.split()[:2] == ["films", "validation"] and row.split()[-1] == "16"
    assert typed(following) == ["fusion.report", "runs=runs"]
    predicted = {"name": "films", "rows": 1200, "output": "out.jsonl", "speed": {"seconds": 2.0}}
    words = ("artifact=films", "input=a", "output=b", "store=s", "attention=true")
    end_of_run(run(trained, "predict", *words, config={"artifact": "films"}), predicted)
    titles, row, following = lines_of(capsys)
    assert (titles.split(), row.split()) == (
        ["name", "examples", "seconds", "output"],
        ["films", "1,200", "2.0", "out.jsonl"],
    )
    assert typed(following) == ["fusion.evaluate", "artifact=films", "store=s"]


def job(name: str, status: str, result: dict[str, Any], *words: str, before: str | None = "new") -> Job:
    return Job(Path("sweep") / name, {"status": status, "before": before, "name": name, "overrides": words}, result)


def test_after_a_sweep(trained: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [
        job("films", "done", trained.result["films"], "+task=films", "store=s", before="done"),
        job("plays", "failed", {}, "+task=plays", "store=s"),
        job("books", "done", trained.result["books"], "+task=books", "store=s"),
        Job(Path("sweep/3-quiz"), {}, {}),
    ]
    end_of_sweep("stage1", Path("sweep"), jobs[:3])
    titles, *rows, fuse, report = lines_of(capsys)
    assert titles.startswith("name   state         best epoch")
    assert [row.split("  ")[0] for row in rows] == ["films", "plays", "books"]
    assert "already done" in rows[0] and rows[1].split() == ["plays", "failed", *"------"] and " done " in rows[2]
    assert typed(fuse) == ["fusion.stage2", "+task=books", "sources=[books,films]", "store=s"]
    assert typed(report) == ["fusion.report", "runs=sweep"]
    end_of_sweep("stage1", Path("sweep"), jobs)
    assert "no status" in "\n".join(lines_of(capsys))


def test_seeds_of_one_task(trained: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [job(f"films-seed-{n}", "done", trained.result["films"] | {"seed": n}, f"seed={n}") for n in (1, 2)]
    end_of_sweep("stage1", Path("sweep"), jobs)
    shown = [line.split() for line in lines_of(capsys)]
    assert ["seeds", "accuracy", "mean", "sd"] in shown and ["2", ANY, "0.0000"] in shown
    again = [job(name, "done", trained.result["films"] | {"seed": 1}, f"name={name}") for name in ("a", "b")]
    assert settings_table(again)[0] == ("runs", "accuracy mean", "sd", "")


def test_a_sweep_ends_with_its_settings(trained: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mean and standard deviation over the seeds of each, with the best one marked; jobs without a score are counted."""
    store = tmp_path / "store"
    scores = {"1e-4": (0.5, 0.7), "1e-3": (0.9, 0.8)}
    jobs = [
        job(
            f"films-{rate}-{seed}",
            "done",
            with_seed(trained, store, "films", f"films-{rate}-{seed}", seed, **{"optim.lr": float(rate)})
            | {"metrics": {"validation": {"accuracy": score}}},
        )
        for rate, pair in scores.items()
        for seed, score in enumerate(pair)
    ]
    overrides = [["+task=films", f"optim.lr={rate}", f"seed={seed}"] for rate in scores for seed in (0, 1)]
    jobs = [
        dataclasses.replace(one, status={**one.status, "overrides": typed})
        for one, typed in zip(jobs, overrides, strict=True)
    ]
    jobs.append(dataclasses.replace(jobs[-1], status={**jobs[-1].status, "status": "failed"}, result={}))
    titles, *rows = settings_table(jobs)
    assert titles == ("optim.lr", "seeds", "accuracy mean", "sd", "")
    assert rows == [("1e-4", "2", "0.6000", "0.1414", ""), ("1e-3", "2 of 3", "0.8500", "0.0707", "best")]
    end_of_sweep("stage1", Path("sweep"), jobs)
    shown = [line.split() for line in lines_of(capsys)]
    assert ["1e-3", "2", "of", "3", "0.8500", "0.0707", "best"] in shown


def test_sources_that_differ_only_in_seed_are_one_setting(trained: Bench, tmp_path: Path) -> None:
    """Whatever is typed: each seed of the fusion names the seed of its sources."""
    store = tmp_path / "store"
    shutil.copytree(trained.folder / "store", store)
    jobs = []
    for seed in (1, 2):
        result = with_seed(trained, store, "both", f"both-{seed}", seed)
        overrides = ["+task=films", f"seed={seed}", f"sources=[films-s{seed},books-s{seed}]"]
        one = job(f"both-{seed}", "done", result | {"metrics": {"validation": {"accuracy": 0.5 + seed / 10}}})
        jobs.append(dataclasses.replace(one, status={**one.status, "overrides": overrides}))
    assert settings_table(jobs) == [("seeds", "accuracy mean", "sd", ""), ("2", "0.6500", "0.0707", "")]


def with_seed(bench: Bench, store: Path, name: str, new: str, seed: int, **settings: Any) -> dict[str, Any]:
    """A copy of a stored artifact as another seed of it; the result of the run that would have made it."""
    shutil.copytree(bench.folder / "store" / name, store / new)
    manifest = json.loads((store / new / "manifest.json").read_text())
    manifest["run"]["config"] |= {"seed": seed} | settings
    write_manifest(store / new / "manifest.json", manifest | {"name": new, "seed": seed})
    return bench.result[name] | {"artifact": str(store / new), "name": new, "seed": seed}


@pytest.mark.parametrize("command", ["stage1", "stage2", "select", "evaluate", "rank", "benchmark"])
def test_a_result_without_scores_prints_nothing(command: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    for result in ({}, {"name": "x", "seed": 1}, {"metrics": None} if command == "evaluate" else {}):
        end_of_run(run(bench, command), result)
    end_of_sweep(command, Path("sweep"), [job("x", "failed", {})])
    assert lines_of(capsys) == []


def test_numbers() -> None:
    assert (score(None), score(0.5), score(1)) == ("-", "0.5000", "1.0000")
    assert (number(None), number(1234567), number(1234.56), number("x")) == ("-", "1,234,567", "1,234.6", "x")

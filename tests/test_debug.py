"""debug=NAME runs through both stages, and nothing that it makes passes for the real thing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion import stage1, stage2
from fusion.cli.config_sources import conf_folder
from fusion.store.lookup import names, read_manifest
from tests.bench import LABELS, write_task

DEBUG = sorted(file.stem for file in (conf_folder() / "debug").glob("*.yaml"))
Go = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("debug") / "my work"
    (folder / "conf" / "task").mkdir(parents=True)
    task = {"kind": "classification", "text": "text", "labels": LABELS, "metrics": ["accuracy"]}
    for name in ("films", "books"):
        write_task(folder / "data", name)
        (folder / "conf" / "task" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture
def go(
    place: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch, in_process: Callable[..., tuple[int, str, str]]
) -> Go:
    """Run a command; gives what it printed and its result."""
    monkeypatch.chdir(place)

    def run(stage: str, *words: str) -> dict[str, Any]:
        main = {"stage1": stage1, "stage2": stage2}[stage].main
        shared = ["data.dir=data", "data.cache_dir=cache", f"backbone.name_or_path={tiny_backbone}"]
        shared += ["backbone.pooling=mean", "data.max_length=16", "data.batch_size=8", "trainer.devices=1"]
        directory = place / "runs" / str(len(list(place.glob("runs/*"))))
        words = (*words, *shared, "trainer.accelerator=cpu", f"hydra.run.dir={directory}")
        code, out, err = in_process(main, *words)
        result = directory / "result.json"
        content = json.loads(result.read_text()) if result.exists() else {}
        return {"code": code, "out": out, "err": err, "folder": directory, "result": content}

    return run


@pytest.mark.parametrize("name", DEBUG)
def test_stage_1(go: Go, place: Path, name: str) -> None:
    few = ["trainer.max_epochs=10"] if name == "overfit" else []  # of 100
    left = go("stage1", "+task=films", f"debug={name}", f"store=store of {name}", *few)
    assert (left["code"], left["err"]) == (0, ""), left["err"]
    kept = [] if name == "one_batch" else ["films-debug"]
    assert sorted(names(place / f"store of {name}")) == kept
    assert left["result"]["name"] == "films-debug"
    assert ("artifact" in left["result"]) == bool(kept)
    assert "films-debug" in left["out"].splitlines()[-1]  # the row of the table, without next commands
    assert ("with trainer.fast_dev_run (debug=one_batch), no artifact is saved" in left["out"]) == (not kept)
    if name == "profile":
        (table,) = left["folder"].glob("*.txt")
        assert f"profiler output: {table}" in left["out"]
        assert "run_training_batch" in table.read_text()


def test_a_debug_run_is_repeated_and_separate_from_the_real_run(go: Go, place: Path) -> None:
    real = ["+task=films", "trainer.max_epochs=1", "logger=none"]
    assert go("stage1", *real)["code"] == 0
    before = read_manifest("films", place / "outputs" / "store")
    for size in (4, 6):  # other settings under the same name: nothing is refused
        left = go("stage1", "+task=films", "debug=limit", f"adapter.bottleneck_size={size}")
        assert left["code"] == 0 and "epoch 2/2" in left["out"]
    assert set(names(place / "outputs" / "store")) == {"films", "films-debug"}
    after = read_manifest("films", place / "outputs" / "store")
    assert (after.hash, after.run) == (before.hash, before.run)
    debugged = read_manifest("films-debug", place / "outputs" / "store")
    assert set(debugged.bottleneck_sizes.values()) == {6}


def test_an_explicit_name_is_marked_as_debug(go: Go, place: Path) -> None:
    assert go("stage1", "+task=films", "debug=limit", "name=mine", "store=named")["code"] == 0
    assert go("stage1", "+task=films", "debug=limit", "name=mine-debug", "store=named")["code"] == 0
    assert set(names(place / "named")) == {"mine-debug"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "limit" else pytest.mark.slow) for name in DEBUG]
)
def test_stage_2(go: Go, place: Path, name: str) -> None:
    if "source" not in names(place / "fused"):
        words = ["+task=books", "trainer.max_epochs=1", "logger=none", "name=source", "store=fused"]
        assert go("stage1", *words)["code"] == 0
    few = ["trainer.max_epochs=10"] if name == "overfit" else []
    left = go("stage2", "+task=films", "sources=[source]", f"debug={name}", "store=fused", *few)
    assert (left["code"], left["err"]) == (0, ""), left["err"]
    assert left["result"]["name"] == "films-adapterfusion-debug"
    assert set(names(place / "fused")) <= {"source", "films-adapterfusion-debug"}


@pytest.mark.slow
def test_a_model_that_learns_overfits(go: Go, place: Path) -> None:
    words = ["debug=overfit", "store=small store", "optim.lr=2e-2", "trainer.log_every_n_steps=1", "logger=csv"]
    left = go("stage1", "+task=films", *words)
    (file,) = left["folder"].glob("csv/metrics.csv")
    lines = file.read_text().splitlines()
    column = lines[0].split(",").index("train/loss")
    losses = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    assert len(losses) == 400 and losses[-1] < 0.05 < losses[0]


def test_an_unknown_preset_is_named(go: Go) -> None:
    left = go("stage1", "+task=films", "debug=overfitt")
    assert left["code"] == 2 and "unknown debug 'overfitt': did you mean overfit?" in left["err"]

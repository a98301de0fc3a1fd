"""The report of real runs on a tiny backbone: its inspections, and missing or damaged files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fusion import evaluate, report, stage1, stage2
from fusion.config.commands import EvaluateConfig, ReportConfig
from fusion.config.data import DataConfig
from fusion.config.stages import Stage1Config, Stage2Config
from fusion.errors import UserError
from fusion.runs.run import record
from tests.bench import Bench


def done(bench: Bench, command: Any, name: str, config: Any) -> dict[str, Any]:
    """Run a command with its run folder, as its program does."""
    run = bench.run(name, config)
    return record(run, lambda: command.main.__wrapped__(config, run))


@pytest.fixture(scope="module")
def trained_bench(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Bench:
    """Two sources; a target with two seeds of an adapter and of a fusion; an evaluation of a source on the target."""
    bench = Bench(tmp_path_factory.mktemp("runs") / "a folder", tiny_backbone)

    def train(command: Any, kind: Any, stage: str, task: str, **changes: Any) -> None:
        config = kind(**bench.settings(task, **changes))
        config.name = config.name or config.default_name()
        done(bench, command, stage, config)

    for task in ("films", "books"):
        train(stage1, Stage1Config, "stage1", task)
    for seed in (1, 2):
        train(stage1, Stage1Config, "stage1", "plays", seed=seed, name=f"plays-{seed}")
        train(stage2, Stage2Config, "stage2", "plays", seed=seed, name=f"fused-{seed}", sources=["films", "books"])
    store = str(bench.folder / "store")
    config = EvaluateConfig(
        artifact="films", task=bench.tasks["plays"], store=store, data=bench.data, accelerator="cpu"
    )
    done(bench, evaluate, "evaluate", config)
    return bench


@pytest.fixture
def copy(trained_bench: Bench, tmp_path: Path) -> Path:
    """A copy of runs and store, to be damaged."""
    folder = tmp_path / "copied"
    shutil.copytree(trained_bench.folder, folder)
    for path in (folder / "runs").rglob("result.json"):
        path.write_text(path.read_text().replace(str(trained_bench.folder), str(folder)))
    return folder


def make(folder: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    settings: dict[str, Any] = {"runs": str(folder / "runs"), "files": False, "accelerator": "cpu", "words": 2}
    settings |= {"data": DataConfig(max_length=None)}
    config = ReportConfig(**settings | changes)
    directory = folder / "runs" / f"report-{len(list((folder / 'runs').iterdir()))}"
    directory.mkdir()
    run = dataclasses.replace(Bench.run(_Numbered(folder), "report", config), directory=directory)  # type: ignore[arg-type]
    report.check(config, run)
    result = record(run, lambda: report.main.__wrapped__(config, run))  # type: ignore[attr-defined]
    return result, config.path.read_text(encoding="utf-8")


class _Numbered:
    """A bench that numbers its runs beyond those of the real one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, 1000 + len(list((folder / "runs").iterdir()))


def test_report_of_all_runs(copy: Path) -> None:
    result, text = make(copy, files=True)
    assert result["targets"] == ["books", "films", "plays"] and result["runs"] == 7
    assert result["notes"] == [] and result["unread"] == []
    assert Path(result["report"]) == copy / "runs" / "report.html" and result["bytes"] == len(text.encode())
    for part in ("fusion of 2", "single adapter", "films alone", "example ", "without", "examples and seeds"):
        assert part in text
    assert 'id="words"' in text and '<div class="row">' in text
    inspections = list((copy / "runs" / "inspections").rglob("inspection.json"))
    assert len(inspections) == 1, "one run of each fusion"
    inspected = json.loads(inspections[0].read_text())
    assert inspected["name"] == "fused-1" and inspected["rows"] == 16 and len(inspected["words"]) == 2
    assert result["files"] and all(Path(path).is_file() for path in result["files"])
    again, _ = make(copy)
    assert list((copy / "runs").rglob("inspection.json")) == inspections, "inspected once"
    assert again["files"] == []


def test_without_inspection(copy: Path) -> None:
    _, text = make(copy, inspect=False)
    assert not list((copy / "runs").rglob("inspection.json"))
    assert "None of these runs contains an inspection of a fusion." in text


def test_missing_store(copy: Path) -> None:
    shutil.rmtree(copy / "store")
    result, text = make(copy)
    assert result["targets"] == ["books", "films", "plays"] and "fusion of 2" in text
    assert "python -m fusion.stage2" in text


def test_failed_inspection_is_a_note(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "store" / "films" / "weights.safetensors").write_bytes(b"cut")
    result, text = make(copy)
    (note,) = result["notes"]
    assert note.startswith("fused-1 could not be inspected: ") and "films" in note
    assert note in caplog.text and "fused-1 could not be inspected" in text


def test_truncated_result_is_named_and_omitted(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = next(path for path in (copy / "runs").rglob("result.json") if '"films"' in path.read_text())
    broken.write_text(broken.read_text()[:40])
    result, text = make(copy, inspect=False)
    assert len(result["unread"]) == 1 and str(broken.parent.name) in result["unread"][0]
    assert "omitted" in caplog.text and "could not be read" in text


def test_split_without_scores(copy: Path) -> None:
    with pytest.raises(UserError, match="split=test"):
        make(copy, split="test", inspect=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": "nowhere"}, "no such folder"),
        ({"runs": []}, "expected a folder"),
        ({"runs": 3}, "expected a folder"),
        ({"words": -1}, "words=-1"),
        ({"inspect_rows": 0}, "inspect_rows=0"),
    ],
)
def test_refused_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=message):
        make(tmp_path, **changes)


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="is a folder; expected a file"):
        make(tmp_path, output=str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^output=.*file: cannot be written \(Not a directory\)"):
        make(tmp_path, output=str(tmp_path / "file" / "report.html"))

"""A job of a sweep that fails, whatever it was doing: the others run, the reason is printed, and the same command again trains it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion import stage1
from fusion.errors import UserError
from tests.bench import LABELS, write_task


@pytest.fixture
def sweep(
    tmp_path: Path,
    tiny_backbone: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_process: Callable[..., tuple[int, str, str]],
) -> Callable[[], tuple[int, str, str]]:
    """Train films and books; gives the exit code and what was printed."""
    (tmp_path / "conf" / "task").mkdir(parents=True)
    for name in ("films", "books"):
        write_task(tmp_path / "data", name, rows=16)
        task = {"kind": "classification", "text": "text", "labels": LABELS, "metrics": ["accuracy"]}
        (tmp_path / "conf" / "task" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.chdir(tmp_path)
    words = ["-m", "+task=films,books", "data.dir=data", "data.cache_dir=cache", "logger=csv", "store=store"]
    words += [f"backbone.name_or_path={tiny_backbone}", "backbone.pooling=mean", "data.max_length=16"]
    words += ["trainer.max_epochs=1", "trainer.accelerator=cpu", "trainer.devices=1", "hydra.sweep.dir=sweep"]
    return lambda: in_process(stage1.main, *words)


def fails_once(monkeypatch: pytest.MonkeyPatch, target: str, error: Exception) -> None:
    """The first call raises: that of the first job, which it ends."""
    module, _, name = target.rpartition(".")
    path, _, owner = module.rpartition(".") if module[module.rfind(".") + 1].isupper() else (module, "", "")
    place: Any = sys.modules[path] if not owner else getattr(sys.modules[path], owner)
    real, left = getattr(place, name), [error]

    def broken(*args: Any, **kwargs: Any) -> Any:
        if left:
            raise left.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, broken)


def statuses(place: Path) -> dict[str, dict[str, Any]]:
    return {file.parent.name: json.loads(file.read_text()) for file in sorted(place.glob("sweep/*/status.json"))}


@pytest.mark.parametrize(
    ("phase", "target"),
    [
        ("reading", "fusion.training.task_rows.load_splits"),
        pytest.param("tokenising", "fusion.training.task_rows.encode", marks=pytest.mark.slow),
        pytest.param("loading the backbone", "fusion.backbones.load.load_backbone", marks=pytest.mark.slow),
        pytest.param("starting the loggers", "fusion.training.stage.build_loggers", marks=pytest.mark.slow),
        ("training", "fusion.training.module.TaskModule.training_step"),
        pytest.param("validation", "fusion.training.module.TaskModule.on_validation_epoch_end", marks=pytest.mark.slow),
        ("storing", "fusion.training.stage.save"),
        pytest.param("showing the result", "fusion.training.stage.log_made", marks=pytest.mark.slow),
    ],
)
def test_a_failed_job_does_not_stop_the_others(
    sweep: Callable[[], tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, target: str
) -> None:
    import fusion.backbones.load
    import fusion.training.stage  # noqa: F401 - what is patched there

    fails_once(monkeypatch, target, RuntimeError(f"boom in {phase}"))
    code, out, err = sweep()
    assert code == 1
    found = statuses(tmp_path)
    assert [status["status"] for status in found.values()] == ["failed", "done"]
    assert found["0-films"]["error"] == f"RuntimeError: boom in {phase}"
    log = (tmp_path / "sweep" / "0-films" / "run.log").read_text()
    assert "Traceback" in log and f"boom in {phase}" in log
    assert err.strip().splitlines()[-2:] == [
        "1 of 2 jobs failed:",
        f"  sweep/0-films/run.log: RuntimeError: boom in {phase}",
    ]
    assert "Traceback" not in err and "2 jobs: " in out and out.strip().endswith("1 failed")
    stored = sorted(folder.name for folder in (tmp_path / "store").iterdir() if folder.name[0] != ".")
    assert stored == (["books", "films"] if phase == "showing the result" else ["books"])
    if phase in ("training", "storing"):  # the same command again
        code, out, err = sweep()
        assert (code, err) == (0, "")
        assert (tmp_path / "store" / "films" / "weights.safetensors").is_file()
        assert "0 failed" in out


def test_a_failing_logger_does_not_fail_a_job(
    sweep: Callable[[], tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytorch_lightning.loggers.csv_logs import ExperimentWriter

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ExperimentWriter, "save", fails)
    code, out, _ = sweep()
    assert code == 0
    assert out.count("the CSV logger failed (") == 2


def test_a_refused_job_stops_the_sweep_before_it_starts(
    sweep: Callable[[], tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fusion.data.splits  # noqa: F401

    fails_once(monkeypatch, "fusion.data.splits.check_source", UserError("no such column"))
    code, _, err = sweep()
    assert code == 2
    assert err.startswith("job 0 (+task=films ") and err.endswith("): no such column\n")
    assert not (tmp_path / "sweep").exists() and not (tmp_path / "store").exists()

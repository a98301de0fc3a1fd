"""An output folder that cannot be created or written, at the start or later: the message, and what is kept."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusion.errors import TrainingError, UserError
from fusion.files import check_writable, write_json
from fusion.runs.run import Run, record

ROOT = Path(__file__).resolve().parents[1]
TASK = "kind: classification\ntext: sentence\nlabels: [negative, positive]\nmetrics: [accuracy]\n"

# seed=1: well; 2: the disk fills, then it fails; 3: the disk fills, then it is done; 4: as 3, while it talks a lot.
PROGRAM = """
import logging, resource, signal, sys
from pathlib import Path
from fusion.cli.app import command
from fusion.config.stages import Stage1Config
from fusion.runs.run import RunState

def check(config, run):
    return RunState("done" if Path(config.store, "made").exists() else "new")

@command("stage1", Stage1Config, check)
def main(config, run):
    made = Path(config.store, "made")
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text("weights")
        if config.seed > 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        if config.seed == 2:
            raise RuntimeError("boom")
        if config.seed == 4:
            for number in range(50):
                logging.getLogger("talk").info("line %d", number)
    return {"stage": 1, "artifact": str(made)}

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "conf" / "task" / "mine.yaml").write_text(TASK)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def start(place: Path, *arguments: str, full: bool = False) -> subprocess.CompletedProcess[str]:
    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    return subprocess.run(
        [sys.executable, "program.py", *arguments, "+task=mine", "trainer.devices=1", "store=store"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=fill if full else None,
    )


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert "Traceback" not in done.stderr and "Logging error" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()


@pytest.mark.parametrize("words", [[], ["-m", "seed=1,2"]], ids=["run", "sweep"])
def test_a_full_disk_is_refused_at_the_start(place: Path, words: list[str]) -> None:
    done = start(place, *words, full=True)
    assert done.returncode == 2, done.stderr
    assert "cannot be written (File too large)" in done.stderr and len(lines(done)) == 1
    assert not (place / "store").exists()


def test_a_full_disk_does_not_hide_the_original_error(place: Path) -> None:
    done = start(place, "seed=2")
    assert done.returncode == 1
    assert "RuntimeError: boom" in done.stderr.splitlines()[-1]
    assert "Logging error" not in done.stderr


@pytest.mark.parametrize("seed", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_a_disk_that_fills_at_the_end_keeps_the_artifact(place: Path, seed: int) -> None:
    """The same command again has a result, and trains nothing."""
    words = [f"seed={seed}", "hydra.run.dir=run"]
    done = start(place, *words)
    assert done.returncode == 1
    told = lines(done)
    assert any(f"store/made was saved, but {place}/run is no longer writable" in line for line in told)
    assert "rerun the command to write result.json" in told[-1]
    assert len(told) <= 3
    assert (place / "store" / "made").read_text() == "weights"
    assert not (place / "run" / "result.json").exists()
    assert [file.name for file in (place / "run").glob(".*.json*")] == []
    again = start(place, *words)
    assert (again.returncode, again.stderr) == (0, "")
    assert json.loads((place / "run" / "result.json").read_text())["artifact"] == "store/made"
    assert json.loads((place / "run" / "status.json").read_text())["before"] == "done"


def test_a_disk_that_fills_in_a_sweep(place: Path) -> None:
    """The current job is done but cannot write its status; the next one cannot start."""
    done = start(place, "-m", "seed=3,1", "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    told = lines(done)
    assert "2 jobs: " in done.stdout and "2 failed" in done.stdout
    assert "2 of 2 jobs failed:" in told
    assert any("0-mine-seed-3" in line and "store/made was saved" in line for line in told)
    assert any("1-mine-seed-1" in line and "no status" in line for line in told) and len(told) <= 9
    again = start(place, "-m", "seed=3,1", "hydra.sweep.dir=sweep")
    assert again.returncode == 0, again.stderr
    assert "2 jobs: 2 already done, 0 resumed, 0 trained, 0 failed" in again.stdout


# --- the parts ----------------------------------------------------------------------------------


def test_check_writable_creates_nothing(tmp_path: Path) -> None:
    assert check_writable(str(tmp_path / "a" / "b"), "hydra.run.dir") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^hydra\.run\.dir=.*file: cannot be written \(.*\); set hydra\.run\.dir=DIR"):
        check_writable(str(tmp_path / "file"), "hydra.run.dir")


def test_a_failed_json_write_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "status.json", {"a": 1})
    with pytest.raises(ValueError, match="Circular"):
        content: dict[str, Any] = {}
        content["itself"] = content
        write_json(tmp_path / "status.json", content)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_json(tmp_path / "folder", {})
    assert json.loads((tmp_path / "status.json").read_text()) == {"a": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "status.json"]


def test_an_unwritable_result_names_the_stored_artifact(tmp_path: Path) -> None:
    run = Run("evaluate", tmp_path / "run", (), {}, "evaluate")

    def work() -> dict[str, Any]:
        (run.directory / "result.json").mkdir()
        return {"artifact": "store/rte"}  # what was looked at, and not what was made

    with pytest.raises(TrainingError, match=r"^the job is done, but .*/run is no longer writable"):
        record(run, work)
    status = json.loads((run.directory / "status.json").read_text())
    assert status["status"] == "failed" and "the job is done" in status["error"]

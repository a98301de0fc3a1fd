"""Two processes that train the same artifact: one after the other, and the second finds it done."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fusion.locks import run_lock

ROOT = Path(__file__).resolve().parents[1]
TASK = "kind: classification\ntext: sentence\nlabels: [negative, positive]\nmetrics: [accuracy]\n"

# A command in place of stage 1: it makes a file STORE/NAME, and adds a line to `trained` each time. The first process
# that makes `films` waits for the file `go`.
PROGRAM = """
import time
from pathlib import Path
from fusion.cli.app import command
from fusion.config.stages import Stage1Config
from fusion.runs.run import RunState

def check(config, run):
    return RunState("done" if (Path(config.store) / config.name).exists() else "new")

@command("stage1", Stage1Config, check)
def main(config, run):
    made = Path(config.store) / config.name
    if not made.exists():
        with open("trained", "a") as file:
            file.write(f"{config.name}\\n")
        while not Path("go").exists():
            time.sleep(0.05)
        made.write_text(str(run.directory))
    return {"stage": 1, "artifact": str(made), "directory": str(run.directory)}

if __name__ == "__main__":
    main()
"""
ENDLESS = """
import sys, time
from pathlib import Path
from fusion.locks import run_lock
with run_lock(Path(sys.argv[1]), "rte"):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "conf" / "task").mkdir(parents=True)
    for name in ("films", "books"):
        (tmp_path / "conf" / "task" / f"{name}.yaml").write_text(TASK)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def start(place: Path, number: int, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
    """The process and the file with its output."""
    log = place / f"output-{number}"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "program.py", *arguments],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )
    return process, log


def until(log: Path, text: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def jobs(place: Path) -> list[dict[str, Any]]:
    found = []
    for file in sorted(place.glob("outputs/**/status.json")):
        result = json.loads((file.parent / "result.json").read_text())
        assert result["directory"] == str(file.parent)  # its own
        found.append(json.loads(file.read_text()))
    return found


@pytest.mark.parametrize(
    ("arguments", "trained"),
    [
        pytest.param(["+task=films"], ["films"], marks=pytest.mark.slow),
        (["-m", "+task=films,books"], ["films", "books"]),
    ],
    ids=["run", "sweep"],
)
def test_the_same_command_twice_at_once(place: Path, arguments: list[str], trained: list[str]) -> None:
    words = [*arguments, "store=store", "trainer.devices=1"]
    first, output = start(place, 1, *words)
    (place / "trained").touch()
    until(place / "trained", "films")
    second, waiting = start(place, 2, *words)
    until(waiting, f"films is being trained by process {first.pid} on {socket.gethostname()} (since 20")
    (place / "go").touch()
    assert (first.wait(90), second.wait(90)) == (0, 0), output.read_text() + waiting.read_text()
    assert (place / "trained").read_text().split() == trained
    found = jobs(place)
    assert [job["status"] for job in found] == ["done"] * 2 * len(trained)
    assert sorted(job["before"] for job in found).count("done") >= 1
    assert waiting.read_text().count("is being trained by") == 1
    assert "Traceback" not in output.read_text() + waiting.read_text()
    if len(trained) == 2:
        assert len(list((place / "outputs" / "stage1").iterdir())) == 2
        assert "2 jobs: 2 new\n" in output.read_text()
        # Either of the two may train the second job.
        counts = re.findall(
            r"2 jobs: \d already done, 0 resumed, (\d) trained", output.read_text() + waiting.read_text()
        )
        assert len(counts) == 2 and sum(map(int, counts)) == 2


def test_a_waiting_process_is_interrupted_at_once(place: Path) -> None:
    first, _ = start(place, 1, "+task=films", "store=store", "trainer.devices=1")
    (place / "trained").touch()
    until(place / "trained", "films")
    second, waiting = start(place, 2, "+task=films", "store=store", "trainer.devices=1")
    until(waiting, "is being trained by process")
    second.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert second.wait(30) == 130
    assert time.monotonic() - started < 10
    (place / "go").touch()
    assert first.wait(60) == 0
    assert (place / "trained").read_text() == "films\n"


def test_a_lock_ends_with_its_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store = tmp_path / "store"
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(store)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "mine\n"
    process.kill()
    process.wait(10)
    with run_lock(store, "rte") as waited:
        assert not waited
        note = json.loads((store / ".locks" / "rte.run-lock.json").read_text())
        assert (note["pid"], note["host"]) == (os.getpid(), socket.gethostname())
        with run_lock(store, "cb") as other:
            assert not other
    assert [file.name for file in (store / ".locks").iterdir() if file.suffix == ".json"] == []
    assert caplog.text == ""
    process.stdout.close()


def test_run_locks_and_artifact_locks_are_distinct(tmp_path: Path) -> None:
    from fusion.store.writing import writing

    (tmp_path / ".locks").mkdir()
    for name in ("rte", "rte.run", "rte.run-lock"):
        with run_lock(tmp_path, "rte"), writing(tmp_path, name, 0.1):
            pass


def test_a_store_without_locks_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".locks").write_text("a file")
    with run_lock(tmp_path, "rte") as waited:
        assert not waited
    assert "cannot be locked (" in caplog.text and "do not start rte twice" in caplog.text

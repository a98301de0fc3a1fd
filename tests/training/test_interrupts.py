"""Signals are deferred until a checkpoint has been written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion.runs.signals import Forward, Terminated
from fusion.training.checkpoints import SIGNALS, Interrupts
from tests.backbones import tiny_models
from tests.bench import LABELS, write_task

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def handlers() -> Iterator[list[int]]:
    """Records the signals that reach the previous handlers."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_a_rank_forwards_its_signals_at_once(handlers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher ends the job."""
    sent: list[int] = []
    forward = Forward(os.getppid())
    signal.signal(signal.SIGTERM, forward)
    with Interrupts() as interrupts:
        interrupts.arm()
        assert signal.getsignal(signal.SIGTERM) is forward
        monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
        signal.raise_signal(signal.SIGTERM)
        assert (sent, interrupts.pending) == ([signal.SIGTERM], None)


def test_a_deferred_signal_calls_the_previous_handler(handlers: list[int]) -> None:
    there = {number: signal.getsignal(number) for number in SIGNALS}
    with Interrupts() as interrupts:
        assert {number: signal.getsignal(number) for number in SIGNALS} == there  # not armed
        interrupts.arm()
        interrupts.handle_pending()  # nothing is pending
        send(signal.SIGTERM)
        assert (interrupts.pending, handlers) == (signal.SIGTERM, [])
        interrupts.handle_pending()
        assert (interrupts.pending, handlers) == (None, [signal.SIGTERM])  # the handler returns
        send(signal.SIGUSR2)  # ignored before, ignored now
        assert interrupts.pending is None
        send(signal.SIGUSR1)
        with pytest.raises(Terminated, match="SIGUSR1"):
            interrupts.handle_pending()
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.handle_pending()
    assert {number: signal.getsignal(number) for number in SIGNALS} == there


def test_a_second_signal_is_handled_at_once(handlers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with Interrupts() as interrupts:
        interrupts.arm()
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # sent twice
        assert (interrupts.pending, handlers) == (signal.SIGTERM, [])
        monkeypatch.setattr("fusion.training.checkpoints.ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
            time.sleep(1)
        assert handlers == []
    assert handlers == [signal.SIGTERM]  # never lost


def test_a_pending_signal_is_handled_at_the_end_unless_there_is_an_error(handlers: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        interrupts.arm()
        send(signal.SIGINT)
    with pytest.raises(ValueError, match="broken"), Interrupts() as interrupts:
        interrupts.arm()
        send(signal.SIGINT)
        raise ValueError("broken")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupts") / "my work"
    (folder / "conf" / "task").mkdir(parents=True)
    write_task(folder / "data", "films")
    task = {"kind": "classification", "text": "text", "labels": LABELS, "metrics": ["accuracy"]}
    (folder / "conf" / "task" / "films.yaml").write_text(yaml.safe_dump(task))
    return folder


def start(place: Path, backbone: Path, *overrides: str) -> subprocess.Popen[str]:
    words = [
        "+task=films", "data.dir=data", "data.cache_dir=cache", f"backbone.name_or_path={backbone}", "backbone.pooling=mean",
        "trainer.accelerator=cpu", "optim.patience=null", "data.max_length=16", "data.batch_size=8", "logger=none",
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "fusion.stage1", *words, *overrides],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(file: Path, process: subprocess.Popen[str], seconds: float = 90) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    content: dict[str, Any] = json.loads(file.read_text())
    return content


@pytest.mark.parametrize(
    ("number", "code", "more"),
    [
        (signal.SIGTERM, 143, ()),
        (signal.SIGINT, 130, ()),
        (signal.SIGUSR1, 143, ()),
        (signal.SIGUSR2, 143, ("trainer.devices=2", "trainer.strategy=ddp")),
        pytest.param(signal.SIGINT, 130, ("trainer.devices=2", "trainer.strategy=ddp"), marks=pytest.mark.slow),
    ],
    ids=["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2, two processes", "SIGINT, two processes"],
)
def test_a_command_writes_a_checkpoint_before_it_ends(
    request: pytest.FixtureRequest,
    place: Path,
    tiny_backbone: Path,
    number: signal.Signals,
    code: int,
    more: tuple[str, ...],
) -> None:
    if number != signal.SIGTERM:  # which is sent to a separate Python process
        request.getfixturevalue("warm")
    name = f"{number.name}-{len(more)}"
    directory = f"hydra.run.dir=runs/{name}"
    process = start(
        place, tiny_backbone, f"name={name}", directory, "trainer.max_epochs=2000", "checkpoint_minutes=null", *more
    )
    runs = place / "outputs" / "store" / ".runs"
    try:
        (folder,) = _only(runs, f"{name}-*", process)
        wait_for(folder / "position.json", process)
        sent = time.time_ns()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert (folder / "last.ckpt").stat().st_mtime_ns > sent
    assert json.loads((folder / "attempt.json").read_text())["status"] == "interrupted"
    assert json.loads((place / "runs" / name / "status.json").read_text())["status"] == "interrupted"


def _only(folder: Path, pattern: str, process: subprocess.Popen[str]) -> list[Path]:
    deadline = time.monotonic() + 90
    while not (found := list(folder.glob(pattern))):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.mark.usefixtures("warm")
def test_a_preempted_slurm_job_resumes_after_requeueing(place: Path, tmp_path: Path) -> None:
    """With submitit's local executor, which requeues a job as SLURM does; on an encoder–decoder model."""
    backbone = tiny_models.save(tmp_path / "backbone", "t5")
    process = start(
        place, backbone, "name=preempted", "trainer.max_epochs=15", "hydra/launcher=submitit_local",
        "hydra.launcher.timeout_min=10", "hydra.sweep.dir=preempted", "-m",
    )  # fmt: skip
    try:
        (folder,) = _only(place / "outputs" / "store" / ".runs", "preempted-*", process)
        wait_for(folder / "position.json", process)
        (job,) = _processes("submitit.core._submit", place)
        os.kill(job, signal.SIGUSR2)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
        for left in _processes("submitit", place):
            os.kill(left, signal.SIGKILL)
    assert process.returncode == 0, err
    log = next((place / "preempted").glob("*/run.log")).read_text()
    assert "SIGUSR2" in log and "resuming at epoch" in log
    assert "Traceback" not in log
    status = json.loads(next((place / "preempted").glob("*/status.json")).read_text())
    assert status["status"] == "done"
    assert (place / "outputs" / "store" / "preempted" / "manifest.json").is_file()


def _processes(word: str, folder: Path) -> list[int]:
    """Process ids with the word in their command line and the folder as working directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if word in (entry / "cmdline").read_text() and (entry / "cwd").resolve() == folder.resolve():
                found.append(int(entry.name))
        except OSError:  # it has ended meanwhile
            continue
    return found

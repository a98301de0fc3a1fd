"""The launcher of DDP processes, with ranks that need no torch: how they end, and the errors."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusion.errors import TrainingError, UserError
from fusion.runs.run import Run
from fusion.runs.signals import Terminated
from fusion.training import processes
from fusion.training.processes import RankError, launch
from tests.training.test_processes import is_running

ROOT = Path(__file__).resolve().parents[2]

# config["does"] has what each rank does; each writes its process id and the signals that it receives.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path

place = Path(os.environ["PLACE"])
rank = os.environ["LOCAL_RANK"]
(place / f"pid{rank}").write_text(str(os.getpid()))

from fusion.errors import TrainingError, UserError
from fusion.runs.signals import Terminated
from fusion.training.processes import job_of_this_rank, run_rank

def handle(number, frame):
    (place / f"signal{rank}").write_text(str(int(number)))
    raise (KeyboardInterrupt if number == signal.SIGINT else Terminated("SIGTERM"))

signal.signal(signal.SIGTERM, handle)
job = job_of_this_rank()
if rank == "0":
    signal.signal(signal.SIGINT, handle)

def work():
    does = job.config["does"][int(rank)]
    (place / f"begun{rank}").touch()
    if does == "raise":
        raise RuntimeError("boom")
    if does == "refuse":
        raise UserError("no such column")
    if does == "lack":
        raise TrainingError("the loss is not finite")
    if does == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "wait":
        time.sleep(60)
    if does == "keep":  # rank one is alive while rank zero ends
        try:
            time.sleep(60)
        finally:
            time.sleep(1.0)
            os.kill(int((place / "pid1").read_text()), 0)
            (place / "kept").touch()
    if does == "ignore":
        while True:
            try:
                time.sleep(60)
            except BaseException:
                (place / "ignore").touch()
    return {"port": os.environ["MASTER_PORT"], "rank_zero": job.run.rank_zero}

sys.exit(run_rank(job, work))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """Launches a rank for each word; afterwards none is alive."""
    (tmp_path / "program.py").write_text(PROGRAM)
    for variable in ("MASTER_PORT", "MASTER_ADDR", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(processes, "GRACE", 1.0)
    folder = tmp_path / "run"
    folder.mkdir()

    def call(*does: str) -> dict[str, Any]:
        program = [sys.executable, str(tmp_path / "program.py")]
        job = Run("stage1", folder, (), {}, "group")
        return launch(program, {"does": list(does)}, job, len(does))

    yield call
    assert not [file.name for file in tmp_path.glob("pid*") if is_running(int(file.read_text()))]


def interrupt_once(files: list[Path], *errors: BaseException) -> Callable[[float], None]:
    """A `time.sleep` that raises in the process that waits, the n-th error as soon as the n-th file is there."""
    left, sleep = list(zip(files, errors, strict=True)), time.sleep

    def wait(interval: float) -> None:
        sleep(interval)
        if left and left[0][0].exists() and threading.current_thread() is threading.main_thread():
            raise left.pop(0)[1]

    return wait


def test_the_result_is_that_of_rank_zero(run: Callable[..., dict[str, Any]]) -> None:
    result = run("well", "well")
    assert result["rank_zero"] is True and int(result["port"]) > 0


@pytest.mark.parametrize(
    ("error", "number"),
    [(KeyboardInterrupt(), signal.SIGINT), (Terminated("SIGTERM"), signal.SIGTERM), (SystemExit(-1), signal.SIGTERM)],
)
def test_only_rank_zero_is_interrupted(
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    number: int,
) -> None:
    """It has time to end, and rank one runs until then."""
    monkeypatch.setattr(processes.time, "sleep", interrupt_once([tmp_path / "begun0"], error))
    with pytest.raises(type(error)):
        run("keep", "wait")
    assert (tmp_path / "signal0").read_text() == str(int(number))
    assert (tmp_path / "kept").exists() and not (tmp_path / "signal1").exists()


def test_a_second_interrupt_kills_at_once(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    files = [tmp_path / "begun0", tmp_path / "ignore"]
    again = interrupt_once(files, KeyboardInterrupt(), Terminated("SIGTERM"))
    monkeypatch.setattr(processes.time, "sleep", again)
    with pytest.raises(Terminated):
        run("ignore", "wait")
    assert time.monotonic() - started < processes.PATIENCE


def test_a_rank_zero_that_ignores_the_interrupt_is_killed(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 1.0)
    monkeypatch.setattr(processes.time, "sleep", interrupt_once([tmp_path / "begun0"], KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run("ignore", "wait")
    assert (tmp_path / "ignore").exists()


@pytest.mark.parametrize(
    ("does", "error", "message"),
    [
        ("wait raise", RankError, r"^rank 1: RuntimeError: boom$"),
        ("wait die", RankError, r"rank 1 was killed \(SIGKILL\).* out of memory\nLower data\.batch_size"),
        ("lack wait", TrainingError, r"^the loss is not finite$"),
        ("wait refuse", UserError, r"^no such column$"),
    ],
)
def test_a_rank_that_fails_ends_the_others(
    run: Callable[..., dict[str, Any]], does: str, error: type[Exception], message: str
) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=message) as raised:
        run(*does.split())
    assert type(raised.value) is error
    assert time.monotonic() - started < 30


def test_the_result_does_not_wait_for_a_rank_that_hangs(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 1.0)
    assert run("well", "wait")["rank_zero"]


def test_a_port_that_cannot_be_used(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("", 0)) as other:
        for port in (str(other.getsockname()[1]), "many", "70000", "-1"):
            monkeypatch.setenv("MASTER_PORT", port)
            with pytest.raises(UserError, match=rf"^MASTER_PORT={port}: expected a free port.*\nUnset MASTER_PORT"):
                run("well", "well")
    assert not list(tmp_path.glob("pid*"))


def test_a_log_that_cannot_be_opened(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "run" / "run.rank1.log").mkdir()
    with pytest.raises(RankError, match=r"could not be started: .*run\.rank1\.log"):
        run("wait", "wait")


def test_a_signal_to_all_processes_ends_rank_zero_first(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As clusters send it."""
    sleep = time.sleep

    def wait(interval: float) -> None:
        sleep(interval)
        if all((tmp_path / f"begun{rank}").exists() for rank in (0, 1)) and not sent:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(int((tmp_path / "pid1").read_text()), number)
            sent.append(True)
            sleep(0.5)
            raise Terminated("SIGTERM")

    sent: list[bool] = []
    monkeypatch.setattr(processes.time, "sleep", wait)
    # Ranks forward signals to their launcher, here this process.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(Terminated):
            run("keep", "wait")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (tmp_path / "kept").exists()

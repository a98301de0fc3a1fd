"""The process that starts the ranks, with ranks that need no torch: what ends them, and what is said."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
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

ROOT = Path(__file__).resolve().parents[2]

# What a rank does stands in config["does"], by rank; each leaves its process id, and what it was told.
PROGRAM = """
import os, signal, socket, sys, time
from pathlib import Path

place = Path(os.environ["PLACE"])
rank = os.environ["LOCAL_RANK"]
(place / f"pid{rank}").write_text(str(os.getpid()))
if (place / f"never{rank}").exists():
    time.sleep(60)

from fusion.errors import TrainingError, UserError
from fusion.runs.signals import Terminated
from fusion.training.processes import job_of_this_rank, run_rank

def told(number, frame):
    (place / f"told{rank}").write_text(str(int(number)))
    raise (KeyboardInterrupt if number == signal.SIGINT else Terminated("SIGTERM"))

signal.signal(signal.SIGTERM, told)
job = job_of_this_rank()
if rank == "0":
    signal.signal(signal.SIGINT, told)

def work():
    does = job.config["does"][int(rank)]
    (place / f"begun{rank}").touch()
    if does == "raise":
        raise RuntimeError("boom")
    if does == "lack":
        raise TrainingError("the loss is not finite")
    if does == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "listen":
        try:
            socket.create_server(("", int(os.environ["MASTER_PORT"])))
        except OSError as error:
            raise RuntimeError(f"code: -98, name: EADDRINUSE, {error}")
    if does == "wait":
        time.sleep(60)
    if does == "keep":  # rank one still answers while rank zero puts down what it holds
        try:
            time.sleep(60)
        finally:
            time.sleep(1.0)
            os.kill(int((place / "pid1").read_text()), 0)
            (place / "kept").touch()
    if does == "deaf":
        while True:
            try:
                time.sleep(60)
            except BaseException:
                (place / "deaf").touch()
    return {"port": os.environ["MASTER_PORT"], "rank_zero": job.run.rank_zero}

sys.exit(run_rank(job, work))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """Launches two ranks that do what is said; afterwards none of them is alive."""
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


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def seconds() -> Iterator[Callable[[], float]]:
    started = time.monotonic()
    yield lambda: time.monotonic() - started


def interrupt_once(files: list[Path], *errors: BaseException) -> Callable[[float], None]:
    """A `time.sleep` that raises in the process that waits, the n-th error as soon as the n-th file is there."""
    left, sleep = list(zip(files, errors, strict=True)), time.sleep

    def wait(interval: float) -> None:
        sleep(interval)
        if left and left[0][0].exists() and threading.current_thread() is threading.main_thread():
            raise left.pop(0)[1]

    return wait


def test_the_result_is_rank_zeros(run: Callable[..., dict[str, Any]]) -> None:
    result = run("well", "well")
    assert result["rank_zero"] is True and int(result["port"]) > 0


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (KeyboardInterrupt(), signal.SIGINT),
        (Terminated("SIGTERM"), signal.SIGTERM),
        (SystemExit(-1), signal.SIGTERM),
    ],
)
def test_an_interruption_is_rank_zeros_alone(
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    number: int,
) -> None:
    """It has the time that it needs, and its fellow is there as long."""
    monkeypatch.setattr(processes.time, "sleep", interrupt_once([tmp_path / "begun0"], error))
    with pytest.raises(type(error)):
        run("keep", "wait")
    assert (tmp_path / "told0").read_text() == str(int(number))
    assert (tmp_path / "kept").exists() and not (tmp_path / "told1").exists()


def test_who_interrupts_twice_waits_for_nobody(
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: Callable[[], float],
) -> None:
    files = [tmp_path / "begun0", tmp_path / "deaf"]
    again = interrupt_once(files, KeyboardInterrupt(), Terminated("SIGTERM"))
    monkeypatch.setattr(processes.time, "sleep", again)
    with pytest.raises(Terminated):
        run("deaf", "wait")
    assert seconds() < processes.PATIENCE


def test_a_rank_zero_that_does_not_listen_is_killed(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 1.0)
    monkeypatch.setattr(processes.time, "sleep", interrupt_once([tmp_path / "begun0"], KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run("deaf", "wait")
    assert (tmp_path / "deaf").exists()


@pytest.mark.parametrize("hours", [-1.0, 1.0])
def test_a_clock_that_is_set_neither_hangs_nor_kills(
    run: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    seconds: Callable[[], float],
    hours: float,
) -> None:
    """Each look at it is an hour off."""
    now = [time.time()]

    def jump() -> float:
        now[0] += 3600 * hours
        return now[0]

    monkeypatch.setattr(processes.time, "time", jump)
    assert run("well", "well")["rank_zero"]
    with pytest.raises(RankError, match="rank 1: RuntimeError: boom"):
        run("wait", "raise")
    assert seconds() < 30


def test_a_rank_that_is_killed(run: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(
        RankError, match=r"rank 1 was killed \(SIGKILL\).* memory runs out\n.*data\.batch_size="
    ):
        run("wait", "die")


def test_what_a_rank_raises_for_the_user_stays_what_it_is(run: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(TrainingError, match=r"^the loss is not finite$") as raised:
        run("lack", "wait")
    assert type(raised.value) is TrainingError


def test_a_rank_that_does_not_start(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "START", 3.0)
    (tmp_path / "never1").touch()
    with pytest.raises(RankError, match="rank 1 did not start within 3 s"):
        run("wait", "wait")


def test_a_rank_that_cannot_end_does_not_take_the_result_away(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 1.0)
    assert run("well", "wait")["rank_zero"]


def test_a_port_that_is_taken_meanwhile_is_another_one(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("", 0)) as other:
        taken, free = other.getsockname()[1], processes._free_port()
        ports = [taken, taken, free]
        monkeypatch.setattr(processes, "_free_port", lambda: ports.pop(0))
        assert run("listen", "well")["port"] == str(free)
        assert caplog.text.count(f"port {taken} was taken by another program: trying another") == 2
        ports += [taken] * processes.PORTS
        with pytest.raises(RankError, match=r"ports were taken before .* MASTER_PORT=PORT"):
            run("listen", "well")
        assert ports == []


def test_a_port_of_the_users_that_is_taken(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=rf"MASTER_PORT={port}: another program .*\n.*unset MASTER_PORT"):
            run("listen", "well")
        assert not list(tmp_path.glob("pid*"))
        # The same if it was free when it was looked at.
        monkeypatch.setattr(processes.socket, "create_server", lambda *_: other.dup())
        with pytest.raises(UserError, match=f"MASTER_PORT={port}"):
            run("listen", "well")
    for wrong in ("many", "0", "70000", "-1"):
        monkeypatch.setenv("MASTER_PORT", wrong)
        with pytest.raises(UserError, match=rf"MASTER_PORT={wrong}: expected a port"):
            run("well", "well")


def test_a_log_that_cannot_be_opened(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "run" / "run.rank1.log").mkdir()
    with pytest.raises(RankError, match=r"could not be started: .*run\.rank1\.log"):
        run("wait", "wait")


def test_a_signal_to_all_processes_leaves_rank_zero_its_fellows(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a cluster does it: the ranks above zero get it too."""
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
    # A rank tells the process that started it, which is this one here: it must not end the tests.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(Terminated):
            run("keep", "wait")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (tmp_path / "kept").exists()


def test_torch_says_of_a_port_that_is_taken_what_the_launcher_looks_for() -> None:
    """Its error has no type of its own."""
    code = (
        "import torch.distributed as d\n"
        "try: d.TCPStore('127.0.0.1', %d, 1, True)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    with socket.create_server(("", 0)) as other:
        said = subprocess.run(
            [sys.executable, "-c", code % other.getsockname()[1]], capture_output=True, text=True, timeout=120
        )
    assert "EADDRINUSE" in said.stdout

"""A signal ends every command cleanly at any time: exit code 130 or 143, one line, status.json interrupted."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion.runs import signals
from fusion.runs.run import Run, record
from fusion.runs.signals import SIGNALS, Terminated, exit_code, held, raised
from tests.bench import LABELS, write_task

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    *(f"fusion.{n}" for n in ("stage1", "stage2", "evaluate", "predict", "rank", "inspect", "report", "compare")),
    *("fusion.sync", "fusion.store"),
    *(f"pipelines.{n}" for n in ("demo", "two_stage", "ranking", "adapterdrop", "compare", "benchmark")),
]


def code_of(number: signal.Signals) -> int:
    return 130 if number == signal.SIGINT else 143


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


# --- in this process --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_each_signal_is_an_exception_and_an_exit_code(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    kind = KeyboardInterrupt if number == signal.SIGINT else Terminated
    before = signal.getsignal(number)
    with pytest.raises(kind), raised():
        send(number)
    assert signal.getsignal(number) == before

    def work() -> int:
        send(number)
        return 0

    assert exit_code(work) == code_of(number)
    assert capfd.readouterr().err == ("interrupted\n" if number == signal.SIGINT else "terminated\n")
    assert exit_code(lambda: 2) == 2


def test_ignored_signals_and_other_handlers_are_kept() -> None:
    """As under nohup, and as in a job of submitit's."""
    seen: list[int] = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    with raised():
        send(signal.SIGHUP)
        send(signal.SIGUSR2)
    assert seen == [signal.SIGUSR2]


def test_a_repeated_signal_counts_once_and_a_second_one_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with raised():
        with pytest.raises(Terminated, match="SIGUSR1"):
            send(signal.SIGUSR1)
        send(signal.SIGTERM)
        monkeypatch.setattr(signals, "ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_signal_waits_while_it_is_held() -> None:
    steps = []
    with raised(), pytest.raises(Terminated, match="SIGHUP"):
        with held():
            with held():
                send(signal.SIGHUP)
            steps.append("whole")
        steps.append("never")
    assert steps == ["whole"]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_inside_a_destructor_is_not_lost(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    """Where Python swallows exceptions; between two jobs of a sweep, most of the time goes by in such places."""

    class Cycle:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            send(number)

    def work() -> int:
        Cycle()
        gc.collect()
        time.sleep(60)
        return 0

    began = time.monotonic()
    assert exit_code(work) == code_of(number)
    assert time.monotonic() - began < 30
    assert capfd.readouterr().err == ("interrupted\n" if number == signal.SIGINT else "terminated\n")


@pytest.mark.parametrize("now", ["running", "done", "interrupted"])
def test_no_status_is_left_running(tmp_path: Path, now: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the signal comes, while the status is written as well."""
    from fusion.runs import run as module

    write = module.write_json
    sent: list[str] = []

    def interrupted_write(path: Path, content: Any) -> None:
        if path.name == "status.json" and content["status"] == now and not sent:
            sent.append(now)
            send(signal.SIGTERM)
        write(path, content)

    monkeypatch.setattr(module, "write_json", interrupted_write)

    def work() -> dict[str, Any]:
        if now == "interrupted":
            raise KeyboardInterrupt
        return {}

    run = Run("stage1", tmp_path / "run", (), {}, "group")
    with pytest.raises(Terminated), raised():
        record(run, work)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == {"running": "interrupted"}.get(now, now)


# --- real programs ----------------------------------------------------------------------------------


# Lets every command wait in the middle of its imports, so that the signal comes there however fast it is.
SLOW_IMPORT = """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "fusion.errors":
            time.sleep(30)
sys.meta_path.insert(0, Slow())
"""


def launch(place: Path, module: str, *words: str, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", module, *words],
        cwd=place,
        env=os.environ | {"PYTHONPATH": f"{place}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **more,
    )


def until(process: subprocess.Popen[str], there: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := there()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for the signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = (line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def ends(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Checks the exit code and the last line on stderr, and that there is no traceback."""
    assert without_traceback(process, number)[-1] == word_of(number)


def word_of(number: signal.Signals) -> str:
    return "interrupted" if number == signal.SIGINT else "terminated"


def without_traceback(process: subprocess.Popen[str], number: signal.Signals) -> list[str]:
    """Checks the exit code and that there is no traceback; gives the lines on stderr."""
    try:
        out, err = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == code_of(number), (out, err)
    assert "Traceback" not in out + err, out + err
    return err.splitlines()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells when the handlers are there")
@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_ends_without_a_traceback_while_it_starts(tmp_path: Path, module: str) -> None:
    number = SIGNALS[COMMANDS.index(module) % len(SIGNALS)]
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORT)
    process = launch(tmp_path, module)
    until(process, lambda: catches(process.pid, signal.SIGUSR1))
    process.send_signal(number)
    ends(process, number)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells when the handlers are there")
def test_under_nohup_a_hangup_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORT.replace("30", "0.5"))
    process = launch(tmp_path, "fusion.store", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    until(process, lambda: catches(process.pid, signal.SIGUSR1))
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=90)
    assert process.returncode == 2  # no words: what it prints then


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals") / "my work"
    (folder / "conf" / "task").mkdir(parents=True)
    write_task(folder / "data", "films")
    task = {"kind": "classification", "text": "text", "labels": LABELS, "metrics": ["accuracy"]}
    (folder / "conf" / "task" / "films.yaml").write_text(yaml.safe_dump(task))
    return folder


def words(backbone: Path, *more: str) -> list[str]:
    return [
        "+task=films", "data.dir=data", "data.cache_dir=cache", f"backbone.name_or_path={backbone}",
        "backbone.pooling=mean", "trainer.accelerator=cpu", "optim.patience=null", "data.max_length=16",
        "data.batch_size=8", "logger=none", "trainer.max_epochs=2000", *more,
    ]  # fmt: skip


def status_of(folder: Path) -> str:
    try:
        return str(json.loads((folder / "status.json").read_text())["status"])
    except FileNotFoundError:
        return ""


def log_of(folder: Path) -> str:
    return (folder / "run.log").read_text() if (folder / "run.log").exists() else ""


MOMENTS: dict[str, Callable[[Path], Any]] = {
    "imports of the job": lambda folder: status_of(folder) == "running",
    "tokenisation": lambda folder: "films train:" in log_of(folder),
}
QUICK = [(signal.SIGUSR2, "imports of the job")]


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        pytest.param(number, moment, id=f"{number.name}, {moment}", marks=[] if (number, moment) in QUICK else pytest.mark.slow)
        for moment in MOMENTS
        for number in SIGNALS
    ],
)  # fmt: skip
def test_a_job_ends_interrupted(place: Path, tiny_backbone: Path, number: signal.Signals, moment: str) -> None:
    name = f"{number.name}-{moment.split()[0]}"
    folder = place / name
    process = launch(place, "fusion.stage1", *words(tiny_backbone, f"hydra.run.dir={name}", f"name={name}"))
    until(process, lambda: MOMENTS[moment](folder))
    process.send_signal(number)
    ends(process, number)
    assert status_of(folder) == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("delay", [0.1, 0.3, 0.6, 1.0, 1.5, 2.0])
def test_no_moment_of_the_start_leaves_a_traceback_or_a_running_status(
    place: Path, tiny_backbone: Path, number: signal.Signals, delay: float
) -> None:
    folder = place / f"{number.name}-{delay}"
    process = launch(
        place, "fusion.stage1", *words(tiny_backbone, f"hydra.run.dir={folder.name}", f"name={folder.name}")
    )
    until(process, lambda: catches(process.pid, signal.SIGUSR1))
    time.sleep(delay)
    process.send_signal(number)
    ends(process, number)
    assert status_of(folder) in ("", "interrupted")


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_between_two_jobs_a_sweep_ends(place: Path, tiny_backbone: Path, number: signal.Signals) -> None:
    folder = place / f"{number.name}-sweep"
    more = ["seed=1,2,3", f"hydra.sweep.dir={folder.name}", f"name={number.name}-${{seed}}", "trainer.max_epochs=1"]
    process = launch(place, "fusion.stage1", "-m", *words(tiny_backbone, *more))
    until(process, lambda: any(status_of(job) == "done" for job in folder.glob("0-*")))
    process.send_signal(number)
    *_, first, last = without_traceback(process, number)
    assert re.match(rf"{word_of(number)}: [12] of 3 jobs done", first)
    assert last.startswith("Rerun the command to continue: ")
    statuses = {status_of(job) for job in folder.glob("*-*")}
    assert "done" in statuses and statuses <= {"done", "interrupted", ""}


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("receivers", ["parent", "all", "rank 0", "rank 1", "parent, while the ranks start"])
def test_two_processes_end_interrupted(
    place: Path, tiny_backbone: Path, number: signal.Signals, receivers: str
) -> None:
    name = f"{number.name}-{receivers.replace(' ', '').replace(',', '-')}"
    process = launch(
        place, "fusion.stage1",
        *words(tiny_backbone, f"hydra.run.dir={name}", f"name={name}", "trainer.devices=2", "trainer.strategy=ddp"),
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    checkpoint = not receivers.startswith("parent,")
    if checkpoint:
        until(process, lambda: list(place.glob(f"outputs/store/.runs/{name}-*/position.json")))
        (saved,) = place.glob(f"outputs/store/.runs/{name}-*/position.json")
    else:
        until(process, lambda: len(children.read_text().split()) == 2)
    ranks = [int(word) for word in children.read_text().split()]
    sent = time.time_ns()
    targets = {"rank 0": ranks[:1], "rank 1": ranks[1:], "all": [process.pid, *ranks]}
    for pid in targets.get(receivers, [process.pid]):
        os.kill(pid, number)
    ends(process, number)
    assert status_of(place / name) == "interrupted"
    if checkpoint:
        assert saved.stat().st_mtime_ns > sent
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)

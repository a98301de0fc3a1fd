"""One attempt of a run: start a command, optionally kill it, and wait until all its processes have exited."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.commands import ROOT
from tests.crash.faults import BEGUN, KILLED, MAIN, VARIABLE, kill_processes, processes_of
from tests.crash.plan import ANY_MOMENT, Kill, Profile

GRACE = 15.0  # seconds in which the other processes must exit after the command
TIMEOUT = 240.0  # seconds after which an attempt is considered to hang
_POLL = 0.05
_CHECK = 0.5  # seconds between two concurrent reads of the store
_UNSET = ("LOCAL_RANK", "FUSION_DATA_DIR", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE")


class Stopped(Exception):
    """The crash test was interrupted; the processes of the attempt were killed."""


@dataclass
class Attempt:
    """Result of an attempt.

    Attributes:
        code: exit code of the command; negative for a signal.
        killed: role of the killed process, or "all"; `None` if none was killed.
        resumed: where training resumed.
        problems: error messages, such as processes that outlived the command.
        folder: directory with run/, output.txt, visits-ROLE.json and one file per process.
    """

    code: int
    killed: str | None
    seconds: float
    resumed: str
    problems: list[str]
    folder: Path

    @property
    def last_line(self) -> str:
        lines = (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "no output")

    @property
    def profile(self) -> Profile:
        visits: Counter[str] = Counter()
        for file in self.folder.glob("visits-*.json"):
            visits |= Counter(json.loads(file.read_text(encoding="utf-8")))
        return Profile(visits, self.seconds)


def make_attempt(
    python: str,
    own: Path,
    command: list[str],
    kill: Kill | None,
    check: Callable[[], str | None],
    stop: threading.Event,
) -> Attempt:
    """Run `python -m COMMAND` and, if `kill` is given, kill it at that fault point.

    Args:
        own: directory of the attempt, created here. The command runs in its parent.
        check: returns an error message about the store, or `None`; called during the attempt and after it.

    Raises:
        Stopped: if `stop` was set.
    """
    own.mkdir(parents=True)
    problems: dict[str, None] = {}  # distinct, in order
    started = checked = time.monotonic()
    due = started + kill.seconds if kill is not None and kill.seconds is not None else None
    process = _start(python, own, command, kill)
    while process.poll() is None:
        now = time.monotonic()
        if due is not None and kill is not None and now >= due and (running := processes_of(own)):
            due = None
            kill_processes(own, kill.target if kill.target in ("all", *running.values()) else MAIN)
        if now - checked >= _CHECK:
            checked = now
            problems[check() or ""] = None
        if now - started > TIMEOUT:
            problems[f"was still running after {TIMEOUT:g} s"] = None
            break
        if stop.is_set():
            break
        time.sleep(_POLL)
    else:
        deadline = time.monotonic() + GRACE
        while alive(own) and time.monotonic() < deadline:
            time.sleep(_POLL)
        if alive(own):
            problems[f"processes were still running {GRACE:g} s after the command exited"] = None
    seconds = time.monotonic() - started
    for pid in alive(own):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.kill()  # if it was interrupted before it wrote its file
    code = process.wait()
    if stop.is_set():
        raise Stopped
    problems[check() or ""] = None
    killed = (own / KILLED).read_text(encoding="utf-8") if (own / KILLED).exists() else None
    return Attempt(code, killed, seconds, resumed_at(own), [p for p in problems if p], own)


def _start(python: str, own: Path, command: list[str], kill: Kill | None) -> subprocess.Popen[bytes]:
    injected = None if kill is None or kill.place == ANY_MOMENT else asdict(kill)
    hook = Path(__file__).with_name("hook")
    path = filter(None, [str(hook), str(ROOT), os.environ.get("PYTHONPATH")])
    environment = {key: value for key, value in os.environ.items() if key not in _UNSET} | {
        VARIABLE: json.dumps({"folder": str(own), "kill": injected}),
        "PYTHONPATH": os.pathsep.join(path),
        "FUSION_CONF": str(own.parents[2] / "work" / "conf"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with (own / "output.txt").open("wb") as output:
        return subprocess.Popen(
            [python, "-m", *command, f"hydra.run.dir={own.name}/run"],
            cwd=own.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C only reaches the crash test, which then kills the attempt
        )


def resumed_at(own: Path) -> str:
    """Return where training resumed, according to the log."""
    log = own / "run" / "run.log"
    found = re.search(r"epoch (\d+), batch (\d+)", log.read_text(encoding="utf-8")) if log.exists() else None
    if found is not None:
        return f"epoch {found[1]}, batch {found[2]}"
    return "the beginning" if (own / BEGUN).exists() else "no training"


def alive(own: Path) -> list[int]:
    """Return the running processes of an attempt."""
    return [pid for pid in processes_of(own) if _state(pid) not in ("", "Z", "X")]


def _state(pid: int) -> str:
    """Return the state of a process, such as R, S or Z; empty if it does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""

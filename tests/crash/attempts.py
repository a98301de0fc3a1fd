"""One attempt of a run: a command is started, perhaps killed, and watched until all its processes have ended."""

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

GRACE = 15.0  # seconds in which the other processes must end after the command
TIMEOUT = 240.0  # seconds after which an attempt counts as hanging
_POLL = 0.05
_CHECK = 0.5  # seconds between two reads of the store, as another program may read it
_UNSET = ("LOCAL_RANK", "FUSION_DATA_DIR", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE")


class Stopped(Exception):
    """The trial was asked to end; the processes of the attempt are dead."""


@dataclass
class Attempt:
    """How one ended.

    code: exit code of the command, below 0 of a signal. killed: the role of the killed process, or "all"; None: none.
    resumed: where it started. problems: what must not happen, such as processes that outlive the command.
    folder: what it wrote: run/, output.txt, visits-ROLE.json and a file for each process.
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
    """Run `python -m COMMAND` and, with `kill`, kill it at its place.

    Args:
        own: the attempt's folder, made here; the command runs in the folder above.
        check: returns what is wrong in the store, if anything; called while the attempt runs and once it is over.

    Raises:
        Stopped: `stop` was set.
    """
    own.mkdir(parents=True)
    problems: dict[str, None] = {}  # each once, in order
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
            problems[f"processes outlived the command by {GRACE:g} s"] = None
    seconds = time.monotonic() - started
    for pid in alive(own):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.kill()  # it may have been stopped before it had a file
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
            start_new_session=True,  # a Ctrl-C is for the trial, which then kills
        )


def resumed_at(own: Path) -> str:
    """Where an attempt started, from its log and whether there was a training batch."""
    log = own / "run" / "run.log"
    found = re.search(r"epoch (\d+), batch (\d+)", log.read_text(encoding="utf-8")) if log.exists() else None
    if found is not None:
        return f"epoch {found[1]}, batch {found[2]}"
    return "the beginning" if (own / BEGUN).exists() else "no training"


def alive(own: Path) -> list[int]:
    """The processes of an attempt that still run."""
    return [pid for pid in processes_of(own) if _state(pid) not in ("", "Z", "X")]


def _state(pid: int) -> str:
    """R, S, Z (zombie) and so on; empty if the process does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""

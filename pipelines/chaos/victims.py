"""Starting a command as a process that may be killed, and seeing that nothing of it is left alive."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from pipelines.chaos.fate import members
from pipelines.commands import ROOT, python_path

_HOOK = ROOT / "pipelines" / "chaos" / "hook"


class Victim(Protocol):
    def poll(self) -> int | None:
        """The exit code (below 0: of a signal), or None while it runs."""


class Starter(Protocol):
    def start(self, words: list[str], folder: Path, more: Mapping[str, str], output: Path) -> Victim:
        """Runs a module with its arguments in a folder, all that it says going to a file."""

    def close(self) -> None: ...


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """What a victim sees: one thread, no tracking, nothing of this process's own ranks, and its fate."""
    left_out = {"LOCAL_RANK", "FUSION_DATA_DIR", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE"}
    found = {key: value for key, value in os.environ.items() if key not in left_out}
    path = [str(_HOOK), str(ROOT), *filter(None, [found.get("PYTHONPATH")])]
    fixed = {
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
    }
    return found | fixed | dict(more)


class Fresh:
    """Every victim is a program of its own, as one that is typed."""

    def start(self, words: list[str], folder: Path, more: Mapping[str, str], output: Path) -> Victim:
        with output.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=folder,
                env=environment(more),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # a Ctrl-C is for the journey, which then kills
            )

    def close(self) -> None:
        pass


class _ForkedVictim:
    def __init__(self, ended: Path, nursery: subprocess.Popen[str]) -> None:
        self._ended, self._nursery = ended, nursery

    def poll(self) -> int | None:
        if self._ended.exists():
            return int(self._ended.read_text(encoding="utf-8"))
        return self._nursery.poll()  # without it there is nobody to say


class Forked:
    """Victims are forked from a process that has imported all they need, which saves them most of their time.

    Ranks are programs of their own all the same: the command starts them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "pipelines.chaos.nursery"],
            cwd=ROOT,
            env=environment({}) | {"PYTHONPATH": python_path()},
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, words: list[str], folder: Path, more: Mapping[str, str], output: Path) -> Victim:
        ended = output.with_suffix(".ended")
        ended.unlink(missing_ok=True)
        asked = {
            "words": words,
            "folder": str(folder),
            "environment": environment(more),
            "output": str(output),
            "ended": str(ended),
        }
        assert self._nursery.stdin is not None
        with self._lock:
            self._nursery.stdin.write(json.dumps(asked) + "\n")
            self._nursery.stdin.flush()
        return _ForkedVictim(ended, self._nursery)

    def close(self) -> None:
        assert self._nursery.stdin is not None
        with contextlib.suppress(OSError):
            self._nursery.stdin.close()
        try:
            self._nursery.wait(10)
        except subprocess.TimeoutExpired:
            self._nursery.kill()
            self._nursery.wait()


def living(folder: Path) -> dict[int, str]:
    """The processes of an attempt that are still there, with their roles."""
    return {pid: role for pid, role in members(folder).items() if _lives(pid)}


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with contextlib.suppress(OSError):  # one that is dead and that nobody has waited for yet
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        return state not in "ZX"
    return True

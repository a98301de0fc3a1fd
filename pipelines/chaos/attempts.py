"""One attempt of a run: started, perhaps killed, and watched until nothing of it is alive."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.chaos.fate import BEGAN, COUNTS, MAIN, PLAN, STRUCK, members, strike
from pipelines.chaos.plan import ANY_MOMENT, Course, Kill
from pipelines.chaos.victims import Starter, living

SURVIVAL = 15.0  # seconds in which the others must be gone once the process that started them is
ENDLESS = 240.0  # seconds after which an attempt counts as hanging
_POLL = 0.05
_LOOK = 0.5  # seconds between two looks into the store, as somebody else would take


class Stopped(Exception):
    """Somebody asked the journey to end; the victims are dead."""


@dataclass
class Attempt:
    """How one went.

    code: exit code of the command; None: it hung. struck: the role of who was killed, or "all"; None: nobody was.
    went_on: what it said of where it began. problems: what must not be, such as processes that outlived it.
    """

    code: int | None
    struck: str | None
    seconds: float
    went_on: str
    problems: list[str] = field(default_factory=list)


def make_attempt(
    starter: Starter,
    folder: Path,
    number: int,
    command: list[str],
    kill: Kill | None,
    look: Callable[[], str | None],
    stop: threading.Event,
) -> Attempt:
    """Runs the command in a folder and sees to its death, if there is to be one.

    Args:
        look: what is wrong in the store, if anything; called while the attempt runs and once it is over.

    Raises:
        Stopped: `stop` was set.
    """
    own = folder / f"attempt-{number}"
    said = folder / f"processes-{number}"
    shutil.rmtree(own, ignore_errors=True)
    shutil.rmtree(said, ignore_errors=True)
    said.mkdir()
    places = None if kill is None or kill.place == ANY_MOMENT else vars(kill)
    more = {PLAN: json.dumps({"folder": str(said), "kill": places})}
    more["FUSION_CONF"] = str(folder.parent.parent / "work" / "conf")
    started = time.monotonic()
    victim = starter.start(
        [*command, f"hydra.run.dir={own.name}"], folder, more, folder / f"output-{number}.txt"
    )
    problems: list[str] = []
    due = None if kill is None or kill.seconds is None else started + kill.seconds
    looked = started
    hung = False
    while (code := victim.poll()) is None:
        now = time.monotonic()
        if due is not None and kill is not None and now >= due and members(said):
            due = None
            whom = kill.whom if kill.whom in ("all", *members(said).values()) else MAIN
            (said / STRUCK).write_text(whom, encoding="utf-8")
            strike(said, whom)
        if now - looked >= _LOOK:
            looked = now
            _add(problems, look())
        hung = hung or now - started > ENDLESS
        if hung or stop.is_set():
            _kill(said)
            if now - started > ENDLESS + SURVIVAL:  # who can neither be found nor killed
                break
        time.sleep(_POLL)
    if not _gone(said, 0.0 if hung else SURVIVAL):
        problems.append(f"processes outlived the command by {SURVIVAL:g} s")
        _kill(said)
    if stop.is_set():
        raise Stopped
    if hung:
        problems.append(f"hung for {ENDLESS:g} s")
    _add(problems, look())
    seconds = time.monotonic() - started
    struck = (said / STRUCK).read_text(encoding="utf-8") if (said / STRUCK).exists() else None
    began = went_on(own / "run.log", (said / BEGAN).exists())
    return Attempt(None if hung else code, struck, seconds, began, problems)


def course_of(folder: Path, number: int, seconds: float) -> Course:
    """What the processes of an attempt counted."""
    found = {}
    for file in (folder / f"processes-{number}").glob(f"{COUNTS}*.json"):
        role = file.stem.removeprefix(COUNTS)
        found[role] = json.loads(file.read_text(encoding="utf-8"))
    return Course(found, seconds)


def went_on(log: Path, trained: bool) -> str:
    """Where an attempt began, by its own words.

    Args:
        trained: it came to a batch.
    """
    try:
        said = log.read_text(encoding="utf-8")
    except OSError:
        said = ""
    if re.search(r" is done already: ", said):
        return "done already"
    found = re.search(r"going on at epoch (\d+), batch (\d+)", said)
    if found is not None:
        return f"epoch {found[1]}, batch {found[2]}"
    if "going on after the last epoch" in said:
        return "after the last epoch"
    return "the beginning" if trained else "killed before it began"


def last_words(folder: Path, number: int) -> str:
    """The last line of an attempt that failed."""
    try:
        said = (folder / f"output-{number}.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "it said nothing"
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _add(problems: list[str], problem: str | None) -> None:
    if problem is not None and problem not in problems:
        problems.append(problem)


def _gone(said: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while living(said):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL)
    return True


def _kill(said: Path) -> None:
    for pid in living(said):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue

"""A sweep seen from outside its jobs: how they stand before, and how they ended. Told by their status files.

The jobs may run in this process, in others, or on other machines, and some may die without a word: so what
counts is the job folders that the sweep was going to have. No clock is asked which status is of this sweep; a
folder that hydra.sweep.dir names may hold those of earlier ones, and a status that was written anew is told by
its file's inode and time of change being others than before.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fusion.config.stages import StageConfig
from fusion.errors import first_line
from fusion.runs.run import RESULT, STATUS, RunState

NAMES = 8  # so many names of a kind are shown,
DETAILS = 4  # and so many with a line of their own
Stamp = tuple[int, int]


@dataclass(frozen=True)
class Sweep:
    """
    folder: hydra.sweep.dir. planned: the jobs' folders, where they are known. seen: the statuses from before.
    told: by absolute folder, why jobs of this very process failed, for those that could not write it down.
    again: what the same command does with the jobs that are done, and with one that was interrupted.
    """

    folder: Path
    planned: tuple[Path, ...]
    seen: Mapping[Path, Stamp]
    told: dict[Path, str] = field(default_factory=dict)
    again: str = "The same command runs all jobs again"

    @classmethod
    def begin(cls, folder: Path, planned: Sequence[Path] = (), again: str | None = None) -> Sweep:
        sweep = cls(folder, tuple(planned), _stamps(folder, planned))
        return sweep if again is None else replace(sweep, again=again)

    def stopped(self, how: str) -> str:
        """Two lines for a sweep that was stopped: what is done, and what the same command does.

        Args:
            how: "interrupted" or "terminated".
        """
        statuses, silent = self._ended()
        done = [
            str(status.get("name") or place.name)
            for place, status in statuses.items()
            if status["status"] == "done"
        ]
        failed = [status for status in statuses.values() if status["status"] == "failed"]
        stopped = len(statuses) - len(done) - len(failed)
        counts = [
            f"{len(done)} of {len(statuses) + len(silent)} jobs done" + (f" ({_some(done)})" if done else ""),
            *([f"{len(failed)} failed"] if failed else []),
            *([f"{stopped} {how}"] if stopped else []),
            *([f"{len(silent)} not started"] if silent else []),
        ]
        return f"{how}: {', '.join(counts)}\n{self.again}"

    def outcome(self) -> tuple[str, list[str]]:
        """One line of counts, and the lines that say which jobs failed; none where none did."""
        statuses, silent = self._ended()
        failed = {place: _reason(status) for place, status in statuses.items() if status["status"] != "done"}
        failed |= {place: "it left no status: killed before it began, or never started" for place in silent}
        failed |= {place: self.told[place.absolute()] for place in failed if place.absolute() in self.told}
        jobs = len(statuses) + len(silent)
        before = [status.get("before") for status in statuses.values() if status["status"] == "done"]
        if any(status.get("before") for status in statuses.values()):
            skipped, continued = before.count("done"), before.count("interrupted")
            trained = len(before) - skipped - continued
            counts = f"{skipped} done already, {continued} continued, {trained} trained"
        else:
            counts = f"{len(before)} done"
        lines = [f"{len(failed)} of {jobs} jobs failed:"] if failed else []
        lines += [f"  {place}/run.log: {reason}" for place, reason in sorted(failed.items())]
        return f"{jobs} job{'s' * (jobs != 1)}: {counts}, {len(failed)} failed", lines

    def jobs(self) -> list[Job]:
        """What each job left, in the order in which they were planned."""
        statuses, silent = self._ended()
        order = {place: number for number, place in enumerate(self.planned)}
        places = sorted([*statuses, *silent], key=lambda place: (order.get(place, len(order)), place))
        return [
            Job(place, status, _result(place) if status.get("status") == "done" else {})
            for place in places
            for status in [statuses.get(place, {})]
        ]

    def _ended(self) -> tuple[dict[Path, dict[str, Any]], list[Path]]:
        """The statuses that this sweep's jobs wrote, and the planned jobs that wrote none."""
        stamps = _stamps(self.folder, self.planned)
        written = [place for place, stamp in stamps.items() if self.seen.get(place) != stamp]
        silent = [place for place in self.planned if place not in written]
        if self.planned:
            # A folder's name may hold what only the launcher knows, such as a cluster's number for the job: then
            # others are there in place of those that were planned. Else they belong to another sweep.
            others = [place for place in written if place not in self.planned][: len(silent)]
            written = [place for place in written if place in self.planned] + others
            silent = silent[len(others) :]
        return {place: _read(place) for place in written}, silent


@dataclass(frozen=True)
class Job:
    """A job of a sweep that has ended: what its status.json and result.json hold, empty where they are not there."""

    place: Path
    status: Mapping[str, Any]
    result: Mapping[str, Any]


def command_again(resume: bool, overwrite: bool) -> str:
    """What the same command does with the jobs of a sweep of trainings that was stopped."""
    if overwrite:
        return "With overwrite=true, the same command trains all jobs again; without it, it skips those that are done"
    if not resume:
        return "The same command skips the jobs that are done and, with resume=false, restarts the others"
    return "The same command continues: it skips the jobs that are done and resumes from the last checkpoint"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return f"{', '.join(names[:NAMES])}{more}"


def summarize_states(jobs: Mapping[str, RunState]) -> list[str]:
    """How the jobs of a sweep stand before the first one starts: a few lines, however many they are."""
    by_state: dict[str, dict[str, str]] = {}
    for name, standing in jobs.items():
        by_state.setdefault(standing.state, {})[name] = standing.detail
    titles = {
        "done": "done already",
        "interrupted": "interrupted, to be continued",
        "failed": "failed the last time, to run again",
        "new": "new",
    }
    counts = [f"{len(by_state[state])} {title}" for state, title in titles.items() if state in by_state]
    lines = [f"{len(jobs)} job{'s' * (len(jobs) != 1)}: {', '.join(counts)}"]
    if done := list(by_state.get("done", ())):
        more = f" and {len(done) - NAMES} more" if len(done) > NAMES else ""
        lines.append(f"  skipped: {', '.join(done[:NAMES])}{more}")
    for state, title in (("interrupted", "goes on"), ("failed", "runs again")):
        found = by_state.get(state, {})
        shown = dict(list(found.items())[:DETAILS])
        lines += [f"  {title}: {name}" + (f" ({_line(why)})" if why else "") for name, why in shown.items()]
        if rest := list(found)[DETAILS:]:
            more = f" and {len(rest) - NAMES} more" if len(rest) > NAMES else ""
            lines.append(f"  {title}: {', '.join(rest[:NAMES])}{more}")
    return lines


def _line(text: str, longest: int = 120) -> str:
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _stamps(folder: Path, planned: Sequence[Path]) -> dict[Path, Stamp]:
    """The job folders that have a status, each with what is another number once it was written anew."""
    found = {}
    for place in sorted({*planned, *(file.parent for file in folder.glob(f"*/{STATUS}"))}):
        with contextlib.suppress(OSError):
            about = (place / STATUS).stat()
            found[place] = (about.st_ino, about.st_mtime_ns)
    return found


def _read(place: Path) -> dict[str, Any]:
    try:
        status = json.loads((place / STATUS).read_text(encoding="utf-8"))
        return status if isinstance(status.get("status"), str) else {"status": "broken"}
    except (OSError, ValueError, AttributeError) as error:
        return {"status": "broken", "error": f"{STATUS} cannot be read: {first_line(error)}"}


def _result(place: Path) -> dict[str, Any]:
    try:
        result = json.loads((place / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def _reason(status: Mapping[str, Any]) -> str:
    if status.get("status") == "running":
        return "it says that it runs: it was killed, or another process is still at it"
    return str(status.get("error") or status["status"])


class JobFailed(RuntimeError):
    """A job of a sweep failed, and its message is printed and recorded: for a sweeper that reads return values."""


def objective(config: StageConfig, result: Mapping[str, Any]) -> float:
    """What a job of a training command returns to Hydra: the score that picks the best epoch, higher is better.

    The best epoch's value of the task's first metric on its first validation split; of several tasks, the mean.
    """
    tasks, metrics = config.task_list, result["metrics"]
    scores = []
    for task in tasks:
        own = [split for split in metrics if len(tasks) == 1 or split.startswith(f"{task.name}/")]
        score = metrics[own[0]][task.metrics[0]]
        scores.append(float("nan") if score is None else float(score))
    return sum(scores) / len(scores)

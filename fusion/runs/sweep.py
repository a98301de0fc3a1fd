"""The state of the jobs of a sweep, read from their status files, since jobs may run on other machines or be killed."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fusion.files import read_json
from fusion.runs.run import RESULT, STATUS

RUN_AGAIN = (
    "Rerun the command to continue: finished training runs are skipped and interrupted ones resume, unless "
    "overwrite=true or resume=false is set"
)
Stamp = tuple[int, int]


@dataclass(frozen=True)
class Job:
    """A finished job, with its status.json and result.json (empty if missing)."""

    place: Path
    status: Mapping[str, Any]
    result: Mapping[str, Any]

    @property
    def state(self) -> str:
        return str(self.status.get("status", "none"))


@dataclass(frozen=True)
class Sweep:
    """A sweep in progress."""

    folder: Path
    planned: tuple[Path, ...]  # directories of the jobs; empty if a custom sweeper chooses them dynamically
    seen: Mapping[Path, Stamp]  # status files from before this sweep

    @classmethod
    def start(cls, folder: Path, planned: Sequence[Path] = ()) -> Sweep:
        return cls(folder, tuple(planned), _stamps(folder, planned))

    def stopped(self, how: str) -> str:
        """Return two lines for a sweep that was "interrupted" or "terminated"."""
        ended = {"done": "done", "failed": "failed", "none": "not started"}
        states = [ended.get(job.state, how) for job in self.jobs()]
        counts = [f"{states.count('done')} of {len(states)} jobs done"]
        counts += [f"{states.count(state)} {state}" for state in ("failed", how, "not started") if state in states]
        return "\n".join([f"{how}: {', '.join(counts)}", RUN_AGAIN])

    def outcome(self) -> tuple[str, list[str]]:
        """Return one line of counts, and a line for each failed job."""
        jobs = self.jobs()
        failed = {job.place: _reason(job) for job in jobs if job.state != "done"}
        before = Counter(job.status.get("before") for job in jobs if job.state == "done")
        counts = f"{before.total()} done"
        if any(job.status.get("before") for job in jobs):
            trained = before.total() - before["done"] - before["interrupted"]
            counts = f"{before['done']} already done, {before['interrupted']} resumed, {trained} trained"
        lines = [f"{len(failed)} of {len(jobs)} jobs failed:"] if failed else []
        lines += [f"  {place}/run.log: {reason}" for place, reason in sorted(failed.items())]
        return f"{_jobs(len(jobs))}: {counts}, {len(failed)} failed", lines

    def jobs(self) -> list[Job]:
        """Return the jobs of this sweep, in the planned order."""
        stamps = _stamps(self.folder, self.planned)
        written = [place for place, stamp in stamps.items() if self.seen.get(place) != stamp]
        # A launcher may set hydra.job.id, so that directories named by it differ from the planned ones.
        others = iter(place for place in written if place not in self.planned)
        places = [place if place in written else next(others, place) for place in self.planned] or sorted(written)
        return [_job(place, place in written) for place in places]


def _reason(job: Job) -> str:
    reasons = {
        "none": "no status: it did not start or was killed at startup",
        "running": "status running: it was killed or is still running in another process",
    }
    return str(reasons.get(job.state) or job.status.get("error") or job.state)


def summarize_states(states: Sequence[str]) -> str:
    """Return one line about the jobs of a sweep before it starts."""
    titles = {
        "done": "already done",
        "interrupted": "interrupted, to be resumed",
        "failed": "failed, to be rerun",
        "new": "new",
    }
    counts = [f"{states.count(state)} {title}" for state, title in titles.items() if state in states]
    return f"{_jobs(len(states))}: {', '.join(counts)}"


def _jobs(count: int) -> str:
    return f"{count} job{'s' * (count != 1)}"


def main_score(result: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the name and best value of the main metric, averaged over tasks, or None if it is unknown or not finite.

    The main metric of a task is the first one of its first validation split.
    """
    first: dict[str, tuple[str, Any]] = {}
    for split, metrics in (result.get("metrics") or {}).items():
        if metrics:
            first.setdefault(split.rpartition("/")[0], next(iter(metrics.items())))
    values = [value for _, value in first.values()]
    if not values or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        return None
    return next(iter(first.values()))[0] if len(first) == 1 else "mean", fmean(values)


def _stamps(folder: Path, planned: Sequence[Path]) -> dict[Path, Stamp]:
    """Map each job directory that has a status to a stamp that changes whenever the status is written."""
    found = {}
    for place in sorted({*planned, *(file.parent for file in folder.glob(f"*/{STATUS}"))}):
        with contextlib.suppress(OSError):
            about = (place / STATUS).stat()
            found[place] = (about.st_ino, about.st_mtime_ns)
    return found


def _job(place: Path, has_status: bool) -> Job:
    status = read_json(place / STATUS) if has_status else {}
    if has_status and not isinstance(status.get("status"), str):
        status = {"status": "broken", "error": f"{STATUS} cannot be read"}
    return Job(place, status, read_json(place / RESULT) if status.get("status") == "done" else {})

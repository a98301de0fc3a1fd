"""The state of a sweep's jobs, which may run anywhere and be killed at any time, read from their status files.

Whether a status file belongs to this sweep is decided by its inode and modification time, not by a clock.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion.config.stages import StageConfig
from fusion.files import read_json
from fusion.runs.run import RESULT, STATUS

RUN_AGAIN = (
    "The same command runs all jobs again: finished trainings are skipped and interrupted ones resume, unless "
    "overwrite=true or resume=false is set"
)
Stamp = tuple[int, int]


@dataclass(frozen=True)
class Job:
    """A job that has ended, with the contents of its status.json and result.json (empty where there is none)."""

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
    planned: tuple[Path, ...]  # the jobs' folders; empty if another sweeper than Hydra's own chooses jobs as it goes
    seen: Mapping[Path, Stamp]  # the status files that were there before
    # Why jobs of this process failed, by absolute folder: for those that could not write their status.
    errors: dict[Path, str] = field(default_factory=dict)

    @classmethod
    def start(cls, folder: Path, planned: Sequence[Path] = ()) -> Sweep:
        return cls(folder, tuple(planned), _stamps(folder, planned))

    def stopped(self, how: str) -> str:
        """Two lines for a sweep that was "interrupted" or "terminated"."""
        states = [
            {"done": "done", "failed": "failed", "none": "not started"}.get(job.state, how) for job in self.jobs()
        ]
        counts = [f"{states.count('done')} of {len(states)} jobs done"]
        counts += [f"{states.count(state)} {state}" for state in ("failed", how, "not started") if state in states]
        return "\n".join([f"{how}: {', '.join(counts)}", RUN_AGAIN])

    def outcome(self) -> tuple[str, list[str]]:
        """One line of counts, and a line for each failed job."""
        jobs = self.jobs()
        failed = {job.place: self._reason(job) for job in jobs if job.state != "done"}
        before = Counter(job.status.get("before") for job in jobs if job.state == "done")
        counts = f"{before.total()} done"
        if any(job.status.get("before") for job in jobs):
            trained = before.total() - before["done"] - before["interrupted"]
            counts = f"{before['done']} done already, {before['interrupted']} continued, {trained} trained"
        lines = [f"{len(failed)} of {len(jobs)} jobs failed:"] if failed else []
        lines += [f"  {place}/run.log: {reason}" for place, reason in sorted(failed.items())]
        return f"{_jobs(len(jobs))}: {counts}, {len(failed)} failed", lines

    def jobs(self) -> list[Job]:
        """The jobs of this sweep with what they wrote, in the planned order."""
        stamps = _stamps(self.folder, self.planned)
        written = [place for place, stamp in stamps.items() if self.seen.get(place) != stamp]
        return [_job(place, place in written) for place in self.planned or sorted(written)]

    def _reason(self, job: Job) -> str:
        reasons = {
            "none": "no status: it was killed before it started, or never started",
            "running": "status running: it was killed, or is still running in another process",
        }
        error = self.errors.get(job.place.absolute()) or reasons.get(job.state) or job.status.get("error")
        return str(error or job.state)


def summarize_states(states: Sequence[str]) -> str:
    """One line about a sweep's jobs before it starts."""
    titles = {
        "done": "done already",
        "interrupted": "interrupted, to be continued",
        "failed": "failed the last time, to run again",
        "new": "new",
    }
    counts = [f"{states.count(state)} {title}" for state, title in titles.items() if state in states]
    return f"{_jobs(len(states))}: {', '.join(counts)}"


def _jobs(count: int) -> str:
    return f"{count} job{'s' * (count != 1)}"


class JobFailed(RuntimeError):
    """A job of a sweep failed after its message was printed: for a sweeper that reads return values."""


def objective(config: StageConfig, result: Mapping[str, Any]) -> float:
    """What a training returns to Hydra, higher is better: the best value of its first metric; of tasks, the mean."""
    tasks, metrics = config.task_list, result["metrics"]
    scores = []
    for task in tasks:
        own = [split for split in metrics if len(tasks) == 1 or split.startswith(f"{task.name}/")]
        score = metrics[own[0]][task.metrics[0]]
        scores.append(float("nan") if score is None else float(score))
    return sum(scores) / len(scores)


def _stamps(folder: Path, planned: Sequence[Path]) -> dict[Path, Stamp]:
    """The job folders with a status, each with a stamp that changes whenever the status is written."""
    found = {}
    for place in sorted({*planned, *(file.parent for file in folder.glob(f"*/{STATUS}"))}):
        with contextlib.suppress(OSError):
            about = (place / STATUS).stat()
            found[place] = (about.st_ino, about.st_mtime_ns)
    return found


def _job(place: Path, has_status: bool) -> Job:
    if not has_status:
        return Job(place, {}, {})
    status = read_json(place / STATUS)
    if not isinstance(status.get("status"), str):
        status = {"status": "broken", "error": f"{STATUS} cannot be read"}
    return Job(place, status, read_json(place / RESULT) if status["status"] == "done" else {})

"""The state of a sweep's jobs before and after it, read from their status files.

Jobs may run in this process, in others or on other machines, and may be killed at any time; what counts are the
folders that the sweep planned. Whether a status file belongs to this sweep or to an earlier one in the same folder is
decided by its inode and modification time, not by a clock.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion.config.stages import StageConfig
from fusion.errors import first_line
from fusion.files import read_json
from fusion.runs.run import RESULT, STATUS, RunState
from fusion.text import shortened

NAMES = 8  # the most names in one list
DETAILS = 4  # the most lines with a detail
RUN_AGAIN = "The same command runs all jobs again"
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
    """A sweep in progress.

    Attributes:
        folder: hydra.sweep.dir.
        planned: the jobs' folders, as far as they are known.
        seen: the status files that were there before.
        errors: by absolute folder, why jobs of this process failed, for those that could not write their status.
        again: what the same command does with jobs that are done and with interrupted ones.
    """

    folder: Path
    planned: tuple[Path, ...]
    seen: Mapping[Path, Stamp]
    errors: dict[Path, str] = field(default_factory=dict)
    again: str = RUN_AGAIN

    @classmethod
    def start(cls, folder: Path, planned: Sequence[Path] = (), again: str | None = None) -> Sweep:
        return cls(folder, tuple(planned), _stamps(folder, planned), again=again or RUN_AGAIN)

    def stopped(self, how: str) -> str:
        """Two lines for a sweep that was stopped: what is done, and what the same command does.

        Args:
            how: "interrupted" or "terminated".
        """
        jobs = self.jobs()
        done = [str(job.status.get("name") or job.place.name) for job in jobs if job.state == "done"]
        states = Counter(job.state for job in jobs)
        stopped = len(jobs) - states["done"] - states["failed"] - states["none"]
        counts = [f"{len(done)} of {len(jobs)} jobs done" + (f" ({_some(done)})" if done else "")]
        others = ((states["failed"], "failed"), (stopped, how), (states["none"], "not started"))
        counts += [f"{count} {text}" for count, text in others if count]
        return f"{how}: {', '.join(counts)}\n{self.again}"

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
        return f"{len(jobs)} job{'s' * (len(jobs) != 1)}: {counts}, {len(failed)} failed", lines

    def jobs(self) -> list[Job]:
        """The jobs of this sweep with what they wrote, in the planned order."""
        stamps = _stamps(self.folder, self.planned)
        written = [place for place, stamp in stamps.items() if self.seen.get(place) != stamp]
        places = list(self.planned) or sorted(written)
        if self.planned:
            # A folder's name may depend on the launcher, such as a cluster's job number: unplanned folders then take
            # the places of planned ones that were never created.
            others = iter(place for place in written if place not in self.planned)
            places = [place if place in written else next(others, place) for place in places]
        return [_job(place, place in written) for place in places]

    def _reason(self, job: Job) -> str:
        reasons = {
            "none": "no status: it was killed before it started, or never started",
            "running": "status running: it was killed, or is still running in another process",
        }
        error = self.errors.get(job.place.absolute()) or reasons.get(job.state) or job.status.get("error")
        return str(error or job.state)


def command_again(resume: bool, overwrite: bool) -> str:
    """What the same command does with the jobs of a stopped sweep of trainings."""
    if overwrite:
        return "With overwrite=true, the same command trains all jobs again; without it, it skips those that are done"
    if not resume:
        return "The same command skips the jobs that are done and, with resume=false, restarts the others"
    return "The same command continues: it skips the jobs that are done and resumes from the last checkpoint"


def summarize_states(jobs: Mapping[str, RunState]) -> list[str]:
    """The states of a sweep's jobs, by the run's name, before it starts, in a few lines."""
    titles = {
        "done": ("done already", "skipped"),
        "interrupted": ("interrupted, to be continued", "resumes"),
        "failed": ("failed the last time, to run again", "runs again"),
        "new": ("new", ""),
    }
    counts = Counter(job.state for job in jobs.values())
    summary = ", ".join(f"{counts[state]} {title}" for state, (title, _) in titles.items() if counts[state])
    lines = [f"{len(jobs)} job{'s' * (len(jobs) != 1)}: {summary}"]
    for state, (_, verb) in titles.items():
        found = {name: job.detail for name, job in jobs.items() if job.state == state and verb}
        detailed = [name for name in found if found[name] and state != "done"][:DETAILS]
        lines += [f"  {verb}: {name} ({shortened(first_line(Exception(found[name])), 120)})" for name in detailed]
        if rest := [name for name in found if name not in detailed]:
            lines.append(f"  {verb}: {_some(rest)}")
    return lines


class JobFailed(RuntimeError):
    """A job of a sweep failed after its message was printed: for a sweeper that reads return values."""


def objective(config: StageConfig, result: Mapping[str, Any]) -> float:
    """What a training job returns to Hydra: the score that selects the best epoch, higher is better.

    The best epoch's value of the task's first metric on its first validation split; the mean over multiple tasks.
    """
    tasks, metrics = config.task_list, result["metrics"]
    scores = []
    for task in tasks:
        own = [split for split in metrics if len(tasks) == 1 or split.startswith(f"{task.name}/")]
        score = metrics[own[0]][task.metrics[0]]
        scores.append(float("nan") if score is None else float(score))
    return sum(scores) / len(scores)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return f"{', '.join(names[:NAMES])}{more}"


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

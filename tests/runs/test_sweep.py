"""The report on a sweep before and after it, from status files only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fusion.files import write_json
from fusion.runs.sweep import Sweep, summarize_states


def leave(folder: Path, status: str, before: str | None = None, error: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "status.json", {"status": status, "before": before, "error": error})
    return folder


def test_every_outcome_of_a_job(tmp_path: Path) -> None:
    planned = [tmp_path / str(number) for number in range(8)]
    sweep = Sweep.start(tmp_path, planned)
    leave(planned[0], "done", "done")
    leave(planned[1], "done", "interrupted")
    leave(planned[2], "done", "new")
    leave(planned[3], "done", "failed")
    leave(planned[4], "failed", "new", "RuntimeError: boom")
    leave(planned[5], "running", "new")
    planned[6].mkdir()
    (planned[6] / "status.json").write_text("{")
    line, failed = sweep.outcome()
    assert line == "8 jobs: 1 already done, 1 resumed, 2 trained, 4 failed"
    assert failed[0] == "4 of 8 jobs failed:"
    assert [text.split(": ")[0] for text in failed[1:]] == [f"  {planned[n]}/run.log" for n in (4, 5, 6, 7)]
    assert failed[1].endswith(": RuntimeError: boom")
    assert "status running" in failed[2]
    assert "status.json cannot be read" in failed[3]
    assert "no status" in failed[4]


def test_jobs_with_status_and_result(tmp_path: Path) -> None:
    """In the order in which they were planned; a result counts only with the status done."""
    planned = [tmp_path / name for name in ("10", "9", "1", "2", "3")]
    sweep = Sweep.start(tmp_path, planned)
    for place, status in zip(planned[:4], ("done", "failed", "done", "done"), strict=True):
        leave(place, status, "new")
        write_json(place / "result.json", {"name": place.name})
    (planned[2] / "result.json").write_text("{")
    (planned[3] / "result.json").write_text("[]")
    jobs = sweep.jobs()
    assert [job.place for job in jobs] == planned
    assert [job.result for job in jobs] == [{"name": "10"}, {}, {}, {}, {}]
    assert [job.status.get("status") for job in jobs] == ["done", "failed", "done", "done", None]


def test_a_command_without_run_states_only_counts(tmp_path: Path) -> None:
    planned = [tmp_path / "0", tmp_path / "1"]
    sweep = Sweep.start(tmp_path, planned)
    for place in planned:
        leave(place, "done")
    assert sweep.outcome() == ("2 jobs: 2 done, 0 failed", [])


def test_directories_that_a_launcher_names(tmp_path: Path) -> None:
    """With hydra.sweep.subdir=${hydra.job.id}, which SLURM's launcher sets to the number of the cluster's job."""
    sweep = Sweep.start(tmp_path, [tmp_path / "0", tmp_path / "1", tmp_path / "2"])
    for name, status in (("123_0", "done"), ("123_1", "done"), ("123_2", "failed")):
        leave(tmp_path / name, status, "new", "boom")
    counts, failed = sweep.outcome()
    assert counts == "3 jobs: 0 already done, 0 resumed, 2 trained, 1 failed"
    assert failed[1:] == [f"  {tmp_path / '123_2'}/run.log: boom"]


@pytest.mark.parametrize("age", [-1e6, 0, 1e6])
def test_the_status_files_of_a_sweep_do_not_depend_on_the_clock(tmp_path: Path, age: float) -> None:
    """Jobs of an earlier sweep in the same folder, and this sweep's under a clock that was set."""
    old = leave(tmp_path / "0", "failed", error="of old")
    leave(tmp_path / "7-of-old", "failed", error="of old")
    now = old.joinpath("status.json").stat().st_mtime
    sweep = Sweep.start(tmp_path, [tmp_path / "0", tmp_path / "1"])
    for name in ("0", "1"):
        leave(tmp_path / name, "done", "new")
        os.utime(tmp_path / name / "status.json", (now + age, now + age))
    assert sweep.outcome() == ("2 jobs: 0 already done, 0 resumed, 2 trained, 0 failed", [])
    again = Sweep.start(tmp_path, [tmp_path / "0", tmp_path / "1"])
    line, failed = again.outcome()  # none of them started: the files are those of the last sweep
    assert line.endswith("2 failed") and len(failed) == 3


def test_jobs_of_another_sweep_in_the_same_folder_are_not_counted(tmp_path: Path) -> None:
    sweep = Sweep.start(tmp_path, [tmp_path / "0"])
    leave(tmp_path / "0", "done", "new")
    leave(tmp_path / "5-other", "failed", "new", "boom")
    assert sweep.outcome()[1] == []


def test_unplanned_jobs(tmp_path: Path) -> None:
    """Another sweeper than Hydra's own finds them as it goes."""
    leave(tmp_path / "0", "failed", "new", "of old")
    sweep = Sweep.start(tmp_path)
    leave(tmp_path / "1", "done", "new")
    assert sweep.outcome()[0] == "1 job: 0 already done, 0 resumed, 1 trained, 0 failed"


def test_the_states_before_a_sweep_are_one_line() -> None:
    assert summarize_states(["new", "done", "interrupted", "failed", "done"]) == (
        "5 jobs: 2 already done, 1 interrupted, to be resumed, 1 failed, to be rerun, 1 new"
    )


def test_a_stopped_sweep_reports_what_is_done(tmp_path: Path) -> None:
    planned = [tmp_path / str(n) for n in range(5)]
    sweep = Sweep.start(tmp_path, planned)
    for place, status in zip(planned, ("done", "done", "failed", "interrupted"), strict=False):
        leave(place, status)
    first, second = sweep.stopped("interrupted").splitlines()
    assert first == "interrupted: 2 of 5 jobs done, 1 failed, 1 interrupted, 1 not started"
    assert second.startswith("Rerun the command to continue: ")

"""State of a run: new, done, interrupted or failed, and the files of an attempt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusion.config.stages import Stage1Config
from fusion.errors import UserError
from fusion.runs.output import ATTEMPT, RunOutput
from fusion.runs.run import Run, RunState
from fusion.runs.signals import Terminated
from fusion.stages import stage1
from tests.bench import Bench


def output_of(bench: Bench, **changes: Any) -> tuple[RunOutput, Run]:
    config = Stage1Config(**bench.settings("films", **changes))
    config.name = config.default_name()
    run = bench.run("stage1", config)
    return stage1.output_of(config, run), run


def test_a_run_from_new_to_done(bench: Bench) -> None:
    output, run = output_of(bench)
    assert output.run_state == RunState("new")
    with output.attempt(run, resume=True):
        attempt = json.loads((output.checkpoints / ATTEMPT).read_text())
        assert set(attempt) == {"status", "error", "directory", "host", "pid", "started"}
        assert (attempt["status"], attempt["directory"]) == ("running", str(run.directory))
        assert output.run_state == RunState(
            "interrupted", "from the beginning"
        )  # what a later process sees after a kill
    assert not output.checkpoints.exists()
    bench.stage1("films")
    assert output_of(bench)[0].run_state == RunState("done")


def test_invalid_input_leaves_no_attempt(bench: Bench) -> None:
    output, run = output_of(bench)
    with pytest.raises(UserError), output.attempt(run, resume=True):
        raise UserError("line 2: label is 'cow'")
    assert not output.checkpoints.exists() and output.run_state == RunState("new")


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (RuntimeError("the power went\nand more"), RunState("failed", "RuntimeError: the power went; resumes at epoch 3, batch 8")),
        (KeyboardInterrupt(), RunState("interrupted", "at epoch 3, batch 8")),
        (Terminated("SIGTERM"), RunState("interrupted", "at epoch 3, batch 8")),
        (SystemExit(144), RunState("interrupted", "at epoch 3, batch 8")),
    ],
    ids=["failed", "Ctrl-C", "SIGTERM", "preempted"],
)  # fmt: skip
def test_a_failed_attempt_keeps_its_checkpoints(bench: Bench, error: BaseException, state: RunState) -> None:
    output, run = output_of(bench)
    with pytest.raises(type(error)), output.attempt(run, resume=True):
        (output.checkpoints / "last.ckpt").write_bytes(b"whole")
        (output.checkpoints / "position.json").write_text('{"epoch": 2, "batch": 7, "steps": 23}')
        raise error
    assert output.run_state == state
    with output.attempt(run, resume=True):
        assert (output.checkpoints / "last.ckpt").exists()
        (output.checkpoints / ATTEMPT).write_text("not json")
        assert output.run_state == RunState("interrupted", "at epoch 3, batch 8")


def test_resume_false_starts_over(bench: Bench) -> None:
    output, run = output_of(bench)
    output.checkpoints.mkdir(parents=True)
    (output.checkpoints / "last.ckpt").write_bytes(b"whole")
    with output.attempt(run, resume=False):
        assert [file.name for file in output.checkpoints.iterdir()] == [ATTEMPT]


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("failed", RunState("failed", "RuntimeError: boom; starts over")),
        ("interrupted", RunState("new", "starts over")),
    ],
)
def test_a_run_that_starts_over_is_not_reported_as_resumed(bench: Bench, status: str, state: RunState) -> None:
    output, _ = output_of(bench, resume=False)
    assert output.run_state == RunState("new")
    output.checkpoints.mkdir(parents=True)
    attempt = {"status": status, "error": "RuntimeError: boom"}
    (output.checkpoints / ATTEMPT).write_text(json.dumps(attempt))
    (output.checkpoints / "last.ckpt").write_bytes(b"whole")
    (output.checkpoints / "position.json").write_text('{"epoch": 2, "batch": 7, "steps": 23}')
    assert output.run_state == state
    assert "resumes at epoch 3, batch 8" in f"resumes {output_of(bench)[0].run_state.detail}"


def test_no_resume_without_a_checkpoint(bench: Bench) -> None:
    """What a full disk leaves: a position of which there is no checkpoint, or a checkpoint without one."""
    output, _ = output_of(bench)
    assert output.outlook == "it starts over, since there is no checkpoint"
    output.checkpoints.mkdir(parents=True)
    (output.checkpoints / ATTEMPT).write_text(json.dumps({"status": "interrupted"}))
    (output.checkpoints / "position.json").write_text('{"epoch": 2, "batch": 7, "steps": 23}')
    assert output.run_state == RunState("interrupted", "from the beginning")
    assert output.outlook == "it starts over, since there is no checkpoint"
    (output.checkpoints / "before.ckpt").write_bytes(b"whole")
    assert output.run_state == RunState("interrupted", "at epoch 3, batch 8")
    assert output.outlook == f"it resumes at epoch 3, batch 8 ({output.checkpoints})"
    (output.checkpoints / "position.json").write_text('{"epoch": null}')
    assert output.outlook == f"it resumes at its last checkpoint ({output.checkpoints})"


def test_only_rank_zero_writes(bench: Bench) -> None:
    output, run = output_of(bench)
    with output.attempt(Run(run.command, run.directory, (), {}, "", rank_zero=False), resume=False):
        assert not output.checkpoints.exists()


def test_checkpoints_of_a_killed_run_are_removed_if_its_artifact_is_stored(bench: Bench) -> None:
    """It was killed after it had stored and before it removed its checkpoints."""
    bench.stage1("films")
    output, _ = output_of(bench)
    output.checkpoints.mkdir(parents=True)
    (output.checkpoints / "last.ckpt").write_bytes(b"whole")
    bench.stage1("films")
    assert not output.checkpoints.exists()


def test_a_run_continues_if_its_attempt_cannot_be_written(bench: Bench, tmp_path: Path) -> None:
    output, run = output_of(bench, store=str(tmp_path / "store"))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".runs").write_text("a file in the way")
    with output.attempt(run, resume=True):
        pass

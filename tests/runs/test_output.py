"""How a run stands: new, done, interrupted or failed, and what stays of an attempt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusion import stage1
from fusion.config.stages import Stage1Config
from fusion.runs.output import ATTEMPT, RunOutput
from fusion.runs.run import Run, RunState
from fusion.runs.signals import Terminated
from tests.bench import Bench


def output_of(bench: Bench, **changes: Any) -> tuple[RunOutput, Run]:
    config = Stage1Config(**bench.settings("films", **changes))
    config.name = config.default_name()
    run = bench.run("stage1", config)
    return stage1.output_of(config, run), run


def test_a_run_from_new_to_done(bench: Bench) -> None:
    entry, run = output_of(bench)
    assert entry.run_state == RunState("new")
    with entry.attempt(run, resume=True):
        said = json.loads((entry.checkpoints / ATTEMPT).read_text())
        assert set(said) == {"status", "error", "directory", "host", "pid", "started"}
        assert (said["status"], said["directory"]) == ("running", str(run.directory))
        assert entry.run_state == RunState(
            "interrupted", "from the beginning"
        )  # for whoever comes after a kill
    assert not entry.checkpoints.exists()
    bench.stage1("films")
    assert output_of(bench)[0].run_state == RunState("done")


@pytest.mark.parametrize(
    ("error", "standing"),
    [
        (RuntimeError("the power went\nand more"), RunState("failed", "RuntimeError: the power went; resumes at epoch 3, batch 8")),
        (KeyboardInterrupt(), RunState("interrupted", "at epoch 3, batch 8")),
        (Terminated("SIGTERM"), RunState("interrupted", "at epoch 3, batch 8")),
        (SystemExit(144), RunState("interrupted", "at epoch 3, batch 8")),
    ],
    ids=["failed", "Ctrl-C", "SIGTERM", "taken away"],
)  # fmt: skip
def test_an_attempt_that_ends_badly_leaves_its_checkpoints(
    bench: Bench, error: BaseException, standing: RunState
) -> None:
    entry, run = output_of(bench)
    with pytest.raises(type(error)), entry.attempt(run, resume=True):
        (entry.checkpoints / "last.ckpt").write_bytes(b"whole")
        (entry.checkpoints / "position.json").write_text('{"epoch": 2, "batch": 7, "steps": 23}')
        raise error
    assert entry.run_state == standing
    with entry.attempt(run, resume=True):
        assert (entry.checkpoints / "last.ckpt").exists()
        (entry.checkpoints / ATTEMPT).write_text("not json")
        assert entry.run_state == RunState("interrupted", "at epoch 3, batch 8")


def test_resume_false_begins_anew(bench: Bench) -> None:
    entry, run = output_of(bench)
    entry.checkpoints.mkdir(parents=True)
    (entry.checkpoints / "last.ckpt").write_bytes(b"whole")
    with entry.attempt(run, resume=False):
        assert [file.name for file in entry.checkpoints.iterdir()] == [ATTEMPT]


@pytest.mark.parametrize(
    ("status", "standing"),
    [
        ("failed", RunState("failed", "RuntimeError: boom; starts over")),
        ("interrupted", RunState("new", "starts over")),
    ],
)
def test_what_begins_anew_is_not_said_to_go_on(bench: Bench, status: str, standing: RunState) -> None:
    entry, _ = output_of(bench, resume=False)
    assert entry.run_state == RunState("new")
    entry.checkpoints.mkdir(parents=True)
    said = {"status": status, "error": "RuntimeError: boom"}
    (entry.checkpoints / ATTEMPT).write_text(json.dumps(said))
    (entry.checkpoints / "last.ckpt").write_bytes(b"whole")
    (entry.checkpoints / "position.json").write_text('{"epoch": 2, "batch": 7, "steps": 23}')
    assert entry.run_state == standing
    assert "resumes at epoch 3, batch 8" in f"resumes {output_of(bench)[0].run_state.detail}"


def test_nothing_resumes_without_a_checkpoint(bench: Bench) -> None:
    """What a full disk leaves: a position of which there is no checkpoint, or a checkpoint without one."""
    entry, _ = output_of(bench)
    assert entry.outlook == "it starts over, since there is no checkpoint"
    entry.checkpoints.mkdir(parents=True)
    (entry.checkpoints / ATTEMPT).write_text(json.dumps({"status": "interrupted"}))
    (entry.checkpoints / "position.json").write_text('{"epoch": 2, "batch": 7, "steps": 23}')
    assert entry.run_state == RunState("interrupted", "from the beginning")
    assert entry.outlook == "it starts over, since there is no checkpoint"
    (entry.checkpoints / "before.ckpt").write_bytes(b"whole")
    assert entry.run_state == RunState("interrupted", "at epoch 3, batch 8")
    assert entry.outlook == f"it resumes at epoch 3, batch 8 ({entry.checkpoints})"
    (entry.checkpoints / "position.json").write_text('{"epoch": null}')
    assert entry.outlook == f"it resumes at its last checkpoint ({entry.checkpoints})"


def test_other_processes_of_a_run_keep_nothing(bench: Bench) -> None:
    entry, run = output_of(bench)
    with entry.attempt(Run(run.command, run.directory, (), {}, "", rank_zero=False), resume=False):
        assert not entry.checkpoints.exists()


def test_what_a_killed_run_left_beside_a_stored_artifact_goes(bench: Bench) -> None:
    """It was killed after it had stored and before it had cleared up."""
    bench.stage1("films")
    entry, _ = output_of(bench)
    entry.checkpoints.mkdir(parents=True)
    (entry.checkpoints / "last.ckpt").write_bytes(b"whole")
    bench.stage1("films")
    assert not entry.checkpoints.exists()


def test_an_attempt_that_cannot_be_noted_goes_on(bench: Bench, tmp_path: Path) -> None:
    entry, run = output_of(bench, store=str(tmp_path / "store"))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".runs").write_text("a file in the way")
    with entry.attempt(run, resume=True):
        pass

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from fusion.config.stages import Stage1Config
from fusion.errors import UserError
from fusion.runs.identity import NOT_IDENTITY_TRAINER, differing_keys, identity, identity_config, name_conflict
from fusion.runs.run import Run, record
from fusion.runs.signals import Terminated

CONFIG = {
    "task": {"name": "rte", "labels": ["a", "b"], "columns": {}},
    "data": {"dir": "rows", "cache_dir": "there", "workers": 2, "limit": {"train": None}},
    "backbone": {"name_or_path": "tiny", "gradient_checkpointing": False},
    "optim": {"lr": 1e-4},
    "trainer": {"max_epochs": 3, "devices": 2, "strategy": "ddp", "precision": None},
    "logger": {"csv": {"flush_every_n_steps": 50}},
    "store": "outputs/store",
    "name": "rte",
    "overwrite": False,
    "resume": True,
    "seed": 42,
}


def changed(**changes: object) -> dict[str, object]:
    return {**CONFIG, **changes}


def run_in(folder: Path, **changes: object) -> Run:
    return Run("stage1", folder / "run", ("+task=rte",), {**CONFIG, **changes}, "stage1")


def test_identity_config_is_flat_and_has_only_what_affects_results() -> None:
    assert identity_config(CONFIG) == {
        "task.name": "rte",
        "task.labels": ["a", "b"],
        "task.columns": {},
        "data.dir": "rows",
        "data.limit.train": None,
        "backbone.name_or_path": "tiny",
        "optim.lr": 1e-4,
        "trainer.max_epochs": 3,
        "trainer.precision": None,
        "seed": 42,
    }


def test_the_identity_of_a_single_task_run_is_that_of_version_0_1() -> None:
    assert identity(changed(tasks=None, method={"temperature": 2.0})) == identity(CONFIG)
    other = changed(method={"temperature": 3.0})
    assert identity(other) != identity(CONFIG)
    differing = differing_keys(identity_config(CONFIG), identity_config(other))
    assert differing == ["method.temperature: 2.0 stored, 3.0 now"]


def test_multiple_tasks_are_compared_key_by_key() -> None:
    one, two = ([{"name": name, "hub": None}, {"name": "cb", "hub": None}] for name in ("rte", "wnli"))
    stored, asked = (identity_config(changed(task=None, tasks=tasks)) for tasks in (one, two))
    assert differing_keys(stored, asked) == ['tasks.0.name: "rte" stored, "wnli" now']
    assert identity(changed(tasks=one)) != identity(changed(tasks=one[::-1]))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"store": "elsewhere"},
        {"logger": {}},
        {"overwrite": True},
        {"resume": False},
        {"backbone": {"name_or_path": "tiny", "gradient_checkpointing": True}},
        {"trainer": {"max_epochs": 3, "devices": 1, "strategy": "auto", "precision": None}},
        {"data": {"dir": "rows", "cache_dir": None, "workers": 0, "limit": {"train": None}}},
    ],
)
def test_identity_ignores_paths_and_hardware(changes: dict[str, object]) -> None:
    assert identity(changed(**changes)) == identity(CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 43},
        {"optim": {"lr": 2e-4}},
        {"data": {"dir": "rows", "limit": {"train": 5}}},
        {"sources": ["a"]},
        {"compile": True},
    ],
)
def test_identity_changes_with_settings_that_affect_results(changes: dict[str, object]) -> None:
    assert identity(changed(**changes)) != identity(CONFIG)


def test_identity_is_stable_and_includes_the_inputs() -> None:
    assert identity(CONFIG) == identity(json.loads(json.dumps(CONFIG)))
    assert len(identity(CONFIG)) == 12
    int(identity(CONFIG), 16)
    one, other = (identity(CONFIG, {"sources": [hash_]}) for hash_ in ("aa", "bb"))
    assert len({one, other, identity(CONFIG, {})}) == 3
    assert identity_config(CONFIG, {"sources": ["aa"]})["inputs.sources"] == ["aa"]


def test_every_ignored_trainer_key_exists() -> None:
    assert set(NOT_IDENTITY_TRAINER) <= set(vars(Stage1Config().trainer))


def test_differing_keys_have_both_values() -> None:
    stored, asked = identity_config(CONFIG), identity_config(changed(seed=1, optim={"lr": 5e-4}, more="x"))
    assert differing_keys(stored, asked) == [
        'more: nothing stored, "x" now',
        "optim.lr: 0.0001 stored, 0.0005 now",
        "seed: 42 stored, 1 now",
    ]
    assert differing_keys(stored, stored) == []


def test_name_conflict() -> None:
    message = str(name_conflict("rte", {"seed": 2}, {"seed": 1}))
    assert re.search(r"different rte: seed: 2 stored, 1 now\n.*name=.*overwrite=true", message)


def test_record_of_a_successful_job(tmp_path: Path) -> None:
    run = run_in(tmp_path)

    def work() -> dict[str, object]:
        status = json.loads((run.directory / "status.json").read_text())
        assert (status["status"], status["ended"]) == ("running", None)
        return {"stage": 1}

    assert record(run, work) == {"stage": 1}
    status = json.loads((run.directory / "status.json").read_text())
    assert status.pop("started") <= status.pop("ended")
    assert status == {
        "status": "done",
        "before": None,
        "command": "stage1",
        "name": "rte",
        "task": "rte",
        "overrides": ["+task=rte"],
        "error": None,
    }
    assert json.loads((run.directory / "result.json").read_text()) == {"stage": 1}
    assert yaml.safe_load((run.directory / "config.yaml").read_text()) == CONFIG
    assert sorted(path.name for path in run.directory.iterdir()) == ["config.yaml", "result.json", "status.json"]


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (RuntimeError("boom"), "failed", "RuntimeError: boom"),
        (UserError("row 3: no label"), "failed", "row 3: no label"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (Terminated("SIGTERM"), "interrupted", "Terminated: SIGTERM"),
    ],
)
def test_record_of_a_failed_job(tmp_path: Path, error: BaseException, status: str, expected: str) -> None:
    run = run_in(tmp_path)

    def work() -> dict[str, object]:
        raise error

    with pytest.raises(type(error)):
        record(run, work)
    written = json.loads((run.directory / "status.json").read_text())
    assert (written["status"], written["error"]) == (status, expected)
    assert written["ended"] is not None
    log = (run.directory / "run.log").read_text()
    assert ("Traceback" in log) == (status == "failed") and type(error).__name__ in log
    assert not (run.directory / "result.json").exists()


def test_record_finds_the_interrupt_behind_a_system_exit(tmp_path: Path) -> None:
    def work() -> dict[str, object]:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904 - as Lightning does it

    with pytest.raises(KeyboardInterrupt):
        record(run_in(tmp_path), work)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "interrupted"


def test_other_ranks_of_a_ddp_job_write_nothing(tmp_path: Path) -> None:
    run = Run("stage1", tmp_path / "run", (), {}, "stage1", rank_zero=False)
    assert record(run, lambda: {"stage": 1}) == {"stage": 1}
    assert not run.directory.exists()


def test_the_status_names_all_tasks(tmp_path: Path) -> None:
    run = run_in(tmp_path, task=None, tasks=[{"name": "rte"}, {"name": "cb"}])
    record(run, lambda: {})
    assert json.loads((run.directory / "status.json").read_text())["task"] == "rte+cb"

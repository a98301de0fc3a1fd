"""Exit code, message and folder of a command line. The command itself is a stub."""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf

from fusion.cli.app import command
from fusion.cli.config_sources import as_text, text_keys
from fusion.config.stages import Stage1Config, Stage2Config
from fusion.config.task import TaskConfig
from fusion.runs.identity import identity_config
from fusion.runs.run import Run, RunState
from fusion.runs.sweep import Sweep, main_score
from fusion.text import PROGRESS

ROOT = Path(__file__).resolve().parents[2]
TASK = "kind: classification\ntext: sentence\nlabels: [negative, positive]\nmetrics: [accuracy]\n"

# seed=13 is refused by check, 7 fails, 8 is a late user error, 99 waits. The stub runs in this process (fast) and as a separate program (for signals).
PROGRAM = """
import logging, time
from fusion.cli.app import command
from fusion.config.stages import Stage1Config
from fusion.errors import UserError

def check(config, run):
    if config.seed == 13:
        raise UserError("seed=13 is unlucky: say another seed=")

@command("stage1", Stage1Config, check)
def main(config, run):
    logging.getLogger("stand-in").info("job %s in group %s", config.name, run.group)
    if config.seed == 7:
        raise RuntimeError("boom")
    if config.seed == 8:
        raise UserError("row 3 has no label: say data.dir=")
    if config.seed == 99:
        print("waiting", flush=True)
        time.sleep(60)
    return {"name": config.name, "seed": config.seed, "directory": str(run.directory)}

if __name__ == "__main__":
    main()
"""


MT = "method=multitask_adapter"


class Outcome:
    """The result of a command line, and the files under outputs/."""

    def __init__(self, folder: Path, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        self.folders = sorted(file.parent for file in folder.glob("outputs/**/status.json"))
        self.statuses = [json.loads((f / "status.json").read_text()) for f in self.folders]


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a blank in its name and two tasks in ./conf/task."""
    folder = tmp_path / "work dir"
    (folder / "conf" / "task").mkdir(parents=True)
    for name in ("mine", "yours"):
        (folder / "conf" / "task" / f"{name}.yaml").write_text(TASK)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def go(workdir: Path, in_process: Callable[..., tuple[int, str, str]]) -> Callable[..., Outcome]:
    namespace: dict[str, Any] = {"__name__": "stand_in"}
    exec(compile(PROGRAM, "stand_in", "exec"), namespace)
    return lambda *words, main=namespace["main"]: Outcome(workdir, *in_process(main, *words))


def in_a_program(workdir: Path, *arguments: str, until: str, number: int) -> tuple[int, Outcome]:
    """Starts the stub as a program, sends the signal once it has printed `until`."""
    (workdir / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = workdir / "output.txt"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "program.py", *arguments],
            stdout=output,
            stderr=output,
            env=environment,
            # A shell's background job ignores SIGINT, and so would every program that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.time() + 300  # the start alone takes half a minute on a busy machine
        while until not in log.read_text() and process.poll() is None and time.time() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        code = process.wait(60)
    return code, Outcome(workdir, code, log.read_text(), "")


# --- a run --------------------------------------------------------------------------------------


def test_a_run_writes_its_files(go: Callable[..., Outcome], workdir: Path) -> None:
    outcome = go("+task=mine", "trainer.devices=1")
    assert (outcome.code, outcome.err) == (0, "")
    (folder,) = outcome.folders
    assert re.fullmatch(r"outputs/stage1/mine/[\d_-]+-[0-9a-f]{6}", str(folder.relative_to(workdir)))
    assert {"config.yaml", "result.json", "run.log", "status.json"} <= {f.name for f in folder.iterdir()}
    result = json.loads((folder / "result.json").read_text())
    assert result == {"name": "mine", "seed": 42, "directory": str(folder)}
    assert outcome.statuses[0]["overrides"] == ["+task=mine", "trainer.devices=1"]
    assert "job mine in group stage1" in (folder / "run.log").read_text()
    assert "name: mine" in (folder / "config.yaml").read_text()


def test_two_runs_in_one_second_have_two_folders(go: Callable[..., Outcome]) -> None:
    go("+task=mine")
    assert len(go("+task=mine").folders) == 2


def test_the_experiment_is_the_group(go: Callable[..., Outcome]) -> None:
    outcome = go("+task=mine", "experiment=quick")
    assert "job mine in group quick" in (outcome.folders[0] / "run.log").read_text()


def test_a_failed_run(go: Callable[..., Outcome]) -> None:
    outcome = go("+task=mine", "seed=7")
    assert outcome.code == 1
    assert outcome.statuses[0]["status"] == "failed"
    assert outcome.statuses[0]["error"] == "RuntimeError: boom"
    log = (outcome.folders[0] / "run.log").read_text()
    assert "Traceback" in log and "boom" in log
    assert "stage1 failed: RuntimeError: boom" in outcome.err and "run.log" in outcome.err


def test_a_late_user_error_prints_no_traceback(go: Callable[..., Outcome]) -> None:
    outcome = go("+task=mine", "seed=8")
    assert (outcome.code, outcome.err) == (2, "row 3 has no label: say data.dir=\n")
    assert outcome.statuses[0]["status"] == "failed"
    assert "Traceback" in (outcome.folders[0] / "run.log").read_text()


def test_a_run_that_restarts_is_logged(go: Callable[..., Outcome]) -> None:
    @command("stage1", Stage1Config, lambda config, run: RunState("new", "restarts"))
    def main(config: Stage1Config, run: Run) -> dict[str, Any]:
        return {}

    assert "mine restarts\n" in go("+task=mine", "trainer.devices=1", main=main).out


# --- wrong commands -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no task: expected +task=NAME, one of "),
        (["+task=mnlii"], "unknown task 'mnlii': did you mean mnli"),
        (["+task=mien"], "did you mean mine"),
        (["task=mine"], "expected +task=NAME"),
        (["+task=[mine,yours]"], "expected a single task +task=NAME"),
        (["+task.kind=regression"], "+task.kind=regression: the group is not selected"),
        (["+task=mine", "logger.csv.flush_every_n_steps=3"], "or logger=[wandb,csv]"),
        (["+task=mine,yours"], "multiple values are a sweep, which needs -m"),
        (["+task=mine", "optim.lrr=1"], "unknown key optim.lrr: did you mean optim.lr"),
        (["+task=mine", "+optim.extra=1"], "unknown key optim.extra"),
        (["+task=mine", "+extra=1"], "unknown key extra"),
        (["+task=mine", "adapter=compacter"], "unknown adapter 'compacter'"),
        (["+task=mine", "trainer.max_epochs=0"], "trainer.max_epochs=0: expected a whole number >= 1"),
        (["+task=mine", "seed=13"], "seed=13 is unlucky"),
        (["+task=mine", "trainer.accelerator=none_such"], "trainer.accelerator=none_such"),
        (["+task=mine", "trainer.strategy=none_such"], "trainer.strategy=none_such"),
        (["-m", "+task=mine", "seed=1,2,13"], "job 2 (+task=mine seed=13): seed=13 is unlucky"),
        (["-m", "+task=mine", "seed=1,x"], "seed=x: expected a whole number"),
        (["-m", "+task=mine,nobody"], "unknown task 'nobody'"),
        (
            ["-m", "+task=mine", "seed=1,2", "name=one"],
            "have the name one: seed=1 and seed=2\nset distinct names with 'name=NAME-${seed}'",
        ),
        (["-m", "+task=mine,yours", "seed=1,2", "name=one"], "'name=NAME-${task.name}-${seed}'"),
        (["+task=mine", "+task=yours"], "duplicate task: expected a single +task=NAME, or a sweep -m"),
        (["+task=mine", "data.dir=/my", "data"], "needs quotes: 'data.dir=/my data'"),
        (["-m", "+task=mine", "seed=1,1"], "are identical: +task=mine seed=1\nexpected distinct values"),
        (["-m", "+task=mine,yours,mine"], "are identical: +task=mine"),
        (["-m", "+task=mine", "optim.lr=1e-4,0.0001"], "are identical: +task=mine optim.lr=0.0001"),
        (
            ["-m", "+task=mine", "backbone.revision=a/b,a-b"],
            "backbone.revision=a/b and backbone.revision=a-b\nset distinct names with 'name=NAME-${backbone.revision}'",
        ),
        (["-m", "seed=1,2"], "no task: expected +task=NAME"),
        (["tasks=[mine,yours]"], "tasks= with method=adapter: multiple tasks need method=multitask_adapter"),
        ([MT, "+task=mine", "tasks=[mine,yours]"], "+task=mine and tasks= cannot be combined"),
        ([MT], "expected 'tasks=[TASK,ANOTHER]'"),
        ([MT, "+task=mine"], "expected 'tasks=[TASK,ANOTHER]'"),
        (
            [MT, "tasks=[mine]"],
            "expected names of at least two tasks, such as 'tasks=[snli,rte,cb]'; for a single task set +task=mine",
        ),
        ([MT, "tasks=[]"], "tasks=[]: expected names of at least two"),
        ([MT, "tasks=mine"], "tasks=mine: expected names of at least two"),
        ([MT, "tasks=[mine,7]"], "unknown task '7'"),
        ([MT, "tasks=[mine,{a:7}]"], "tasks=[mine,{a:7}]: expected names"),
        ([MT, "tasks=[mine,'[yours,rte]']"], "expected names of at least two tasks"),
        ([MT, "tasks=mine,yours"], "a list is written 'tasks=[mine,yours]'"),
        ([MT, "tasks=[mine,yours,mine]"], "tasks=[mine,yours,mine]: expected distinct tasks, got duplicate mine"),
        ([MT, "tasks=[mine,yuors]"], "unknown task 'yuors': did you mean yours?"),
        ([MT, "tasks=[mine,yours]", "method.temperature=0"], "method.temperature=0.0: expected a finite number > 0"),
        (["-m", MT, "tasks=[mine,yours],[mine]"], "job 1 ("),
        ([MT, "tasks=[mine,yours]", "task.label=x"], "edit the files of tasks in tasks="),
        ([MT, "tasks=[mine,yours]", "++task.columns.sentence=text"], "edit the files of tasks in tasks="),
    ],
)
def test_a_wrong_command(go: Callable[..., Outcome], arguments: list[str], message: str) -> None:
    outcome = go(*arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert 1 <= len(outcome.err.strip().splitlines()) <= 2
    if "none_such" not in message:  # only Lightning detects that one, when the job has started
        assert not Path("outputs").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder where nothing can be made")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hydra.run.dir=/proc/nowhere/run"], r"^hydra.run.dir=/proc/nowhere/run: cannot be written \(No such file"),
        (["hydra.run.dir=file"], r"^hydra.run.dir=file: cannot be written \(Not a directory\)"),
        (["hydra.run.dir=file/run"], r"^hydra.run.dir=file/run: Not a directory"),
        (["-m", "seed=1,2", "hydra.sweep.dir=/proc/nowhere"], r"^hydra.sweep.dir=/proc/nowhere: cannot be written"),
        (["-m", "seed=1,2", "hydra.sweep.dir=taken"], r"^taken/1-mine-seed-2 is a file"),
        (["hydra.run.dir=logged"], r"logged/run\.log: cannot be written \(Is a directory\)"),
    ],
)
def test_an_invalid_folder_is_refused(go: Callable[..., Outcome], words: list[str], message: str) -> None:
    Path("file").touch()
    Path("taken").mkdir()
    Path("taken/1-mine-seed-2").touch()
    Path("logged/run.log").mkdir(parents=True)
    outcome = go(*words, "+task=mine", "trainer.devices=1")
    assert outcome.code == 2, outcome.err
    assert re.search(message, outcome.err) and re.search(r"hydra\.(run|sweep)\.dir=DIR", outcome.err)
    assert "Traceback" not in outcome.err and len(outcome.err.strip().splitlines()) <= 2
    assert outcome.folders == []


def test_a_task_in_two_places_is_refused(go: Callable[..., Outcome]) -> None:
    Path("conf/task/rte.yaml").write_text(TASK)
    outcome = go("+task=rte")
    assert outcome.code == 2
    assert outcome.err.startswith("task rte is defined in ")


def test_a_user_defined_choice_is_listed_with_the_built_in_ones(go: Callable[..., Outcome]) -> None:
    Path("conf/method").mkdir()
    Path("conf/method/small.yaml").write_text("name: lora\nrank: 2\n")
    assert go("+task=mine", "method=small").code == 0
    outcome = go("+task=mine", "method=smal")
    assert outcome.code == 2
    assert outcome.err == (
        "unknown method 'smal': did you mean small? known: adapter, bitfit, full, head, lora, multitask_adapter, "
        "multitask_full, small\n"
    ).replace("? known", "?; known")
    Path("conf/method/lora.yaml").write_text("name: lora\n")
    outcome = go("+task=mine", "method=lora")
    assert outcome.code == 2
    assert outcome.err.startswith("method lora is defined in ") and len(outcome.err.splitlines()) == 1


def test_one_of_multiple_tasks_in_two_places_is_refused(go: Callable[..., Outcome]) -> None:
    Path("conf/task/rte.yaml").write_text(TASK)
    outcome = go("tasks=[mine,rte]", MT)
    assert outcome.code == 2
    assert outcome.err.startswith("task rte is defined in ")


def test_multiple_tasks_reach_the_command_typed_and_in_order(go: Callable[..., Outcome]) -> None:
    seen: list[Any] = []

    def check(config: Stage1Config, run: Run) -> None:
        seen.append((config, run))

    @command("stage1", Stage1Config, check)
    def main(config: Stage1Config, run: Run) -> dict[str, Any]:
        return {}

    outcome = go("tasks=[yours,stsb,mine]", MT, "trainer.devices=1", main=main)
    assert (outcome.code, outcome.err) == (0, "")
    config, run = seen[0]
    assert [(type(t), t.name, t.kind, t.text) for t in config.task_list] == [
        (TaskConfig, "yours", "classification", "sentence"),
        (TaskConfig, "stsb", "regression", ["sentence1", "sentence2"]),
        (TaskConfig, "mine", "classification", "sentence"),
    ]
    assert config.name == "yours-stsb-mine-multitask_adapter"
    # Their content is part of what the run is, not their names alone.
    flat = identity_config(run.config)
    assert (flat["tasks.1.name"], flat["tasks.1.hub.name"], flat["tasks.0.labels"]) == (
        "stsb",
        "stsb",
        ["negative", "positive"],
    )
    # A process of a DDP job is handed the config as JSON.
    again = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Stage1Config), run.config))
    assert isinstance(again, Stage1Config) and again.task_list == config.task_list
    assert re.fullmatch(r"yours-stsb-mine", outcome.folders[0].parent.name)
    assert outcome.statuses[0]["task"] == "yours+stsb+mine"


def test_a_sweep_over_lists_of_tasks(go: Callable[..., Outcome]) -> None:
    outcome = go("-m", "tasks=[mine,yours],[yours,rte]", MT, "trainer.devices=1")
    assert (outcome.code, outcome.err) == (0, "")
    names = [status["name"] for status in outcome.statuses]
    assert names == ["mine-yours-multitask_adapter", "yours-rte-multitask_adapter"]
    assert outcome.folders[1].name == "1-yours-rte"


def test_fusion_conf_may_contain_tasks(
    go: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "more" / "task").mkdir(parents=True)
    (tmp_path / "more" / "task" / "theirs.yaml").write_text(TASK)
    assert go("+task=theirs").code == 2
    monkeypatch.setenv("FUSION_CONF", str(tmp_path / "more"))
    assert go("+task=theirs").code == 0
    (tmp_path / "more" / "task" / "mine.yaml").write_text(TASK)
    assert "is defined in" in go("+task=mine").err
    monkeypatch.setenv("FUSION_CONF", str(tmp_path / "none"))
    assert "directory not found" in go("+task=mine").err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kind: [", "broken.yaml"),
        (TASK + "labelz: [a]\n", "conf file task/broken.yaml: unknown key labelz: did you mean task.label"),
        (TASK.replace("accuracy", "pearson"), "task broken: metrics=[pearson]: expected one or more of accuracy"),
        (TASK.replace("[negative, positive]", "[positive]"), "task broken: labels=[positive]: expected at least 2"),
    ],
)
def test_a_broken_task_file_is_named(go: Callable[..., Outcome], content: str, message: str) -> None:
    Path("conf/task/broken.yaml").write_text(content)
    outcome = go("+task=broken")
    assert (outcome.code, len(outcome.err.strip().splitlines())) in ((2, 1), (2, 2))
    assert message in outcome.err


# --- sweeps -------------------------------------------------------------------------------------


def test_a_sweep_over_tasks(go: Callable[..., Outcome]) -> None:
    outcome = go("-m", "+task=mine,yours")
    assert (outcome.code, outcome.err) == (0, "")
    assert [folder.name for folder in outcome.folders] == ["0-mine", "1-yours"]
    sweep = outcome.folders[0].parent.name
    assert re.fullmatch(r"sweep-[\d_-]+-[0-9a-f]{6}", sweep)
    assert [status["name"] for status in outcome.statuses] == ["mine", "yours"]
    assert f"in group {sweep}" in (outcome.folders[0] / "run.log").read_text()


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("name=true", "name='true'"),
        ("name=1e3,007,a", "name='1e3',007,a"),
        ("name=null", "name=null"),  # the default name
        ("+task=null", "+task='null'"),
        ("+task=7 , No,nan", "+task='7' , No,'nan'"),
        ("sources=[1e3,null, 1_000]", "sources=['1e3','null', '1_000']"),
        ("backbone.revision=12e4567", "backbone.revision='12e4567'"),
        ("data.dir=2024/01", "data.dir=2024/01"),
        ("name='true'", "name='true'"),
        ("name=1-2", "name=1-2"),
        ("name=rte-${seed}", "name=rte-${seed}"),
        ("name=range(1,3)", "name=range(1,3)"),
        ("seed=1e3", "seed=1e3"),  # a number
        ("optim.lr=1e-3,2", "optim.lr=1e-3,2"),
        ("compile=true", "compile=true"),
        ("~logger", "~logger"),
        ("name=", "name="),
        ("name=\u00e9", "name=\u00e9"),
    ],
)
def test_text_is_what_was_typed(word: str, meant: str) -> None:
    """Not what Hydra makes of it: True, 1000.0, infinity."""
    assert as_text(word, text_keys(Stage2Config) | {"task"}) == meant


def test_names_that_parse_as_other_types(go: Callable[..., Outcome]) -> None:
    for name in ("1e3", "null"):
        Path(f"conf/task/{name}.yaml").write_text(TASK)
    outcome = go("-m", "+task=1e3,null", "hydra.sweep.dir=outputs/s")
    assert (outcome.code, outcome.err) == (0, "")
    assert [status["name"] for status in outcome.statuses] == ["1e3", "null"]
    assert outcome.statuses[0]["overrides"] == ["+task='1e3'"]  # it can be typed again
    outcome = go(MT, "tasks=[null,1e3]", "hydra.run.dir=outputs/t")
    assert outcome.statuses[-1]["name"] == "null-1e3-multitask_adapter"


def test_a_flag_may_be_anywhere(go: Callable[..., Outcome]) -> None:
    outcome = go("+task=mine", "-m", "seed=1,2")
    assert (outcome.code, len(outcome.folders)) == (0, 2)


def test_swept_keys_are_in_names_and_folders(go: Callable[..., Outcome]) -> None:
    outcome = go("-m", "+task=mine", "seed=3", "optim.lr=1e-4,5e-4", "adapter.layers=[0,1]", "method=head,adapter")
    assert [status["name"] for status in outcome.statuses] == [
        "mine-head-optim.lr-0.0001",
        "mine-optim.lr-0.0001",
        "mine-head-optim.lr-0.0005",
        "mine-optim.lr-0.0005",
    ]
    assert outcome.folders[1].name == "1-mine-method-adapter-optim.lr-0.0001"
    outcome = go("-m", "+task=mine", "adapter.layers=[0,1],[2]")
    assert [status["name"] for status in outcome.statuses[-2:]] == ["mine-adapter.layers-0-1", "mine-adapter.layers-2"]


def test_a_name_may_interpolate_swept_keys(go: Callable[..., Outcome]) -> None:
    outcome = go("-m", "+task=mine", "seed=1,2", "name=mine-${seed}")
    assert outcome.code == 0, outcome.err
    assert [status["name"] for status in outcome.statuses] == ["mine-1", "mine-2"]


def test_given_names_are_kept(go: Callable[..., Outcome]) -> None:
    outcome = go("-m", "+task=mine", "name=true,1e3", "seed=3")
    assert [status["name"] for status in outcome.statuses] == ["true", "1e3"]
    # and can be typed again, by a report or by a reader of status.json
    assert outcome.statuses[0]["overrides"] == ["+task=mine", "name='true'", "seed=3"]


def test_a_failed_job_does_not_stop_the_others(go: Callable[..., Outcome]) -> None:
    outcome = go("-m", "+task=mine", "seed=7,8,1")
    assert outcome.code == 1
    assert [status["status"] for status in outcome.statuses] == ["failed", "failed", "done"]
    assert "boom" in (outcome.folders[0] / "run.log").read_text()
    assert "boom" not in (outcome.folders[2] / "run.log").read_text()
    first, second = outcome.err.split("2 of 3 jobs failed:\n")[1].strip().splitlines()
    assert first.endswith("0-mine-seed-7/run.log: RuntimeError: boom")
    assert second.endswith("1-mine-seed-8/run.log: row 3 has no label: say data.dir=")


def test_check_runs_for_all_jobs_first_and_for_each_again(go: Callable[..., Outcome]) -> None:
    seen: list[str] = []

    def check(config: Stage1Config, run: Run) -> None:
        seen.append(f"check {config.name}")

    @command("stage1", Stage1Config, check)
    def main(config: Stage1Config, run: Run) -> dict[str, Any]:
        seen.append(f"run {config.name}")
        return {}

    assert go("-m", "+task=mine,yours", main=main).code == 0
    checks = ["check mine", "check yours"]
    assert seen == [*checks, "check mine", "run mine", "check yours", "run yours"]


def test_the_state_of_a_run_is_printed_before_it_starts(go: Callable[..., Outcome]) -> None:
    states = {1: RunState("done"), 2: RunState("interrupted", "epoch 3"), 3: RunState("failed", "boom")}

    def check(config: Stage1Config, run: Run) -> RunState:
        return states.get(config.seed, RunState("new"))

    @command("stage1", Stage1Config, check)
    def main(config: Stage1Config, run: Run) -> dict[str, Any]:
        return {}

    words = ["+task=mine", "trainer.devices=1"]
    outcome = go("-m", "seed=1,2,3,4", *words, main=main)
    assert outcome.code == 0
    assert outcome.out.startswith("4 jobs: 1 already done, 1 interrupted, ")
    assert outcome.out.endswith("4 jobs: 1 already done, 1 resumed, 2 trained, 0 failed\n")
    assert [status["before"] for status in outcome.statuses] == ["done", "interrupted", "failed", "new"]
    resumed, failed = ((folder / "run.log").read_text() for folder in outcome.folders[1:3])
    assert "mine-seed-2 was interrupted: resuming (epoch 3)" in resumed
    assert "mine-seed-3 failed before: rerunning (boom)" in failed
    assert go("seed=4", *words, main=main).out == ""


def test_a_sweep_identifies_its_jobs_without_the_clock(
    go: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call is an hour earlier, and the folder holds a failed job of an earlier sweep."""
    words = ["+task=mine", "trainer.devices=1", "hydra.sweep.dir=sweep"]
    assert go("-m", "seed=7,1", *words).code == 1
    now = [time.time()]

    def jump() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", jump)
    outcome = go("-m", "seed=1,2", *words)
    assert (outcome.code, outcome.err) == (0, "") and outcome.out.endswith("2 jobs: 2 done, 0 failed\n")
    outcome = go("-m", "seed=7,2", *words)
    assert outcome.code == 1 and "1 of 2 jobs failed:\n  sweep/0-mine-seed-7/run.log" in outcome.err


# --- at a terminal ------------------------------------------------------------------------------


def test_concurrent_jobs_draw_no_progress_bars(go: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a launcher's processes, which are not aware of the sweep and share a terminal."""
    monkeypatch.setenv(PROGRESS, "1")
    monkeypatch.setattr(Sweep, "start", lambda *_: None)
    wanted = []

    @command("stage1", Stage1Config, lambda config, run: None)
    def main(config: Stage1Config, run: Run) -> dict[str, Any]:
        wanted.append(os.environ[PROGRESS])
        return {}

    assert go("+task=mine", "trainer.devices=1", main=main).code == 0
    assert go("-m", "+task=mine,yours", "trainer.devices=1", main=main).code == 0
    assert wanted == ["1", "0", "0"]


# --- interrupts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_a_sweep(workdir: Path, number: int, code: int) -> None:
    arguments = ["-m", "+task=mine", "seed=1,99,2", "trainer.devices=1"]
    got, outcome = in_a_program(workdir, *arguments, until="waiting", number=number)
    assert got == code
    assert [status["status"] for status in outcome.statuses] == ["done", "interrupted"]
    assert "Traceback" not in outcome.out


# --- help and errors of the code -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["stage1", "stage2", "select", "rank", "evaluate", "predict"])
def test_help_lists_the_choices(go: Callable[..., Outcome], name: str) -> None:
    outcome = go("--help", main=importlib.import_module(f"fusion.{name}").main)
    assert (outcome.code, outcome.err) == (0, "")
    for word in (f"python -m fusion.{name} ", "mine", "130 interrupted", "--cfg job"):
        assert word in outcome.out


def test_help_is_fast(workdir: Path) -> None:
    def spent() -> float:
        return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # seconds of computing

    before = spent()
    words = [sys.executable, "-m", "fusion.stage1", "--help"]
    subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=True)
    assert spent() - before < 2  # it takes 0.7, and waiting for a busy machine does not count


def test_private_parts_of_hydra_are_used_in_one_file() -> None:
    files = (ROOT / "fusion").rglob("*.py")
    found = {file.name for file in files if re.search(r"(hydra|omegaconf)\._", file.read_text("utf-8"))}
    assert found == {"hydra_internals.py"}


@pytest.mark.parametrize("arguments", [("+task=mine",), ("-m", "+task=mine,yours")])
def test_a_bug_in_a_check_is_not_a_user_error(go: Callable[..., Outcome], arguments: tuple[str, ...]) -> None:
    def check(config: Stage1Config, run: Run) -> None:
        raise ValueError("a fault of ours")

    @command("stage1", Stage1Config, check)
    def main(config: Stage1Config, run: Run) -> dict[str, Any]:
        return {}

    outcome = go(*arguments, main=main)
    assert (outcome.code, outcome.folders) == (1, [])
    assert "Traceback" in outcome.err
    assert outcome.err.endswith("stage1 failed: ValueError: a fault of ours\n")


# --- a sweeper that searches ------------------------------------------------------------------------

SEARCHED = """
from fusion.cli.app import command
from fusion.config.stages import Stage1Config
from fusion.errors import TrainingError, UserError

@command("stage1", Stage1Config, check=lambda config, run: None)
def main(config, run):
    if config.seed == 3:
        raise UserError("no such column")
    if config.seed == 4:
        raise TrainingError("the loss is nan")
    if config.seed == 5:
        raise RuntimeError("boom")
    # The first split and its first metric count.
    return {"metrics": {"near": {"accuracy": config.seed / 10, "f1": 0.1}, "far": {"accuracy": 9.0}}}
"""


class StandIn(Sweeper):
    """Runs seeds one after another, as a search does, and keeps what came back."""

    def __init__(self, seeds: Any, tolerant: bool = False) -> None:
        self.seeds, self.tolerant = list(seeds), tolerant

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        assert self.launcher is not None
        for number, seed in enumerate(self.seeds):
            (job,) = self.launcher.launch([[*arguments, f"seed={seed}"]], initial_job_idx=number)
            try:
                SEEN.append(float(job.return_value))
            except Exception as error:
                SEEN.append(f"{type(error).__name__}: {error}")
                if not self.tolerant:
                    raise


SEEN: list[Any] = []


@pytest.fixture
def search(
    go: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, bool], tuple[Outcome, list[Any]]]:
    module = types.ModuleType("hydra_plugins.stand_in")
    monkeypatch.setattr(StandIn, "__module__", module.__name__)
    monkeypatch.setattr(module, "StandIn", StandIn, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    Plugins.instance().register(StandIn)
    settings = {"_target_": "hydra_plugins.stand_in.StandIn", "seeds": [], "tolerant": False}
    ConfigStore.instance().store(group="hydra/sweeper", name="stand_in", node=settings)
    namespace: dict[str, Any] = {"__name__": "stand_in"}
    exec(compile(SEARCHED, "stand_in", "exec"), namespace)

    def run(seeds: str, tolerant: bool) -> tuple[Outcome, list[Any]]:
        SEEN.clear()
        outcome = go(
            "-m",
            "+task=mine",
            "hydra/sweeper=stand_in",
            f"hydra.sweeper.seeds=[{seeds}]",
            f"hydra.sweeper.tolerant={tolerant}",
            main=namespace["main"],
        )
        return outcome, list(SEEN)

    return run


def test_a_job_returns_its_objective_to_the_sweeper(search: Callable[..., tuple[Outcome, list[Any]]]) -> None:
    outcome, seen = search("1,2,7", False)
    assert outcome.code == 0, outcome.err
    assert seen == pytest.approx([0.1, 0.2, 0.7])
    assert [status["name"] for status in outcome.statuses] == ["mine-seed-1", "mine-seed-2", "mine-seed-7"]


def test_a_failed_job_is_an_exception_to_the_sweeper(search: Callable[..., tuple[Outcome, list[Any]]]) -> None:
    outcome, seen = search("1,3,4,5,2", True)
    failures = ["RuntimeError: no such column", "RuntimeError: the loss is nan", "RuntimeError: RuntimeError: boom"]
    assert seen == [0.1, *failures, 0.2]
    assert outcome.code == 1
    assert [status["status"] for status in outcome.statuses] == ["done", "failed", "failed", "failed", "done"]
    outcome, seen = search("1,4,2", False)
    assert seen == [0.1, failures[1]] and outcome.code == 1
    assert "Traceback" not in outcome.err


def test_the_objective_of_multiple_tasks_is_their_mean() -> None:
    metrics = {f"{name}/{split}": {"accuracy": score, "f1": 0.0} for name, split, score in (
        ("ab", "near", 0.5), ("a", "validation", 0.7), ("ab", "far", 0.1))}  # fmt: skip
    assert main_score({"metrics": metrics}) == ("mean", pytest.approx(0.6))
    assert main_score({"metrics": {"a/x": {"accuracy": None}, "ab/x": {"accuracy": 1.0}}}) is None

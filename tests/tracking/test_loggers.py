"""W&B and CSV: one run per job, and no error of W&B stops or delays training."""

from __future__ import annotations

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning
import torch
import wandb
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger

from fusion.config.training import CsvConfig, LoggerConfig, WandbConfig
from fusion.errors import UserError
from fusion.runs.run import Run
from fusion.tracking import loggers as loggers_module
from fusion.tracking import wandb_run
from fusion.tracking.loggers import build_loggers, finish, log_made, log_result
from fusion.tracking.wandb_run import state
from tests.bench import Bench
from tests.tracking.conftest import KEY, clean_wandb, history, records, summary
from tests.tracking.wandb_server import WandbServer, wandb_server

ROOT = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO, logger="fusion.tracking")
    with clean_wandb(tmp_path / "home"):
        yield


def start(
    directory: Path, name: str = "rte", csv: bool = False, rank_zero: bool = True, **options: Any
) -> list[Logger]:
    config = LoggerConfig(wandb=WandbConfig(**({"init_timeout": 20} | options)))
    config.csv = CsvConfig(flush_every_n_steps=2) if csv else None
    values = {"optim": {"lr": 1e-4}, "store": Path("outputs/store"), "sources": ("a", "b")}
    run = Run("stage1", directory, (), values, "sweep", rank_zero)
    return build_loggers(config, run, name=name, tags=["rte", "minilm", "adapter", "", "x" * 80])


def manifest(name: str, digit: str, kind: str = "adapter", run: Any = None) -> Any:
    """The part of a manifest that is logged."""
    return SimpleNamespace(name=name, hash=digit * 64, kind=kind, run=SimpleNamespace(wandb=run))


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("fusion.tracking")]


def fails(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("the disk is full\nand more")


def test_jobs_of_one_process_have_their_own_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, name in enumerate(("rte", "mrpc")):
        loggers = start(tmp_path / name, name)
        assert [type(logger).__name__ for logger in loggers] == ["SafeWandbLogger"]
        for step in range(3):
            loggers[0].log_metrics({"train/loss": float(number)}, step)
        finish(loggers, exit_code=number)
    for number, name in enumerate(("rte", "mrpc")):
        (run,) = records(tmp_path / name, "run")
        labels = [run[key] for key in ("display_name", "run_group", "job_type", "project")]
        assert labels == [name, "sweep", "stage1", "adapter-fusion"]
        assert run["tags"] == ["rte", "minilm", "adapter", "x" * 64]
        config = run["config"]["update"]
        assert config["optim/lr"] == 1e-4
        assert config["store"] == "outputs/store" and config["sources"] == ["a", "b"]
        rows = [(item["train/loss"], item["trainer/global_step"]) for item in history(tmp_path / name)]
        assert rows == [(number, step) for step in range(3)]
        assert records(tmp_path / name, "exit")[0].get("exit_code", 0) == number
        metrics = records(tmp_path / name, "metric")
        assert any(metric.get("step_metric") == "trainer/global_step" for metric in metrics)
    lines = notices(caplog)
    assert len(lines) == 2 and all("W&B is offline (no API key is set" in line for line in lines)
    assert f"python -m fusion.sync runs={tmp_path / 'mrpc'}`" in lines[1]
    assert next((tmp_path / "mrpc").glob("wandb/offline-run-*")).is_dir()
    assert "WANDB_MODE" not in os.environ


PROGRAM = """
import logging, resource, sys
from pathlib import Path
from fusion.config.training import LoggerConfig, WandbConfig
from fusion.runs.run import Run
from fusion.tracking.loggers import log_result
from fusion.tracking.loggers import build_loggers, finish
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
logging.raiseExceptions = False  # as in commands
if int(sys.argv[2]) >= 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
for name in ("rte", "mrpc"):
    run = Run("stage1", Path(sys.argv[1]) / name, (), {}, "g")
    loggers = build_loggers(LoggerConfig(wandb=WandbConfig()), run, name=name, tags=[])
    for step in range(100):
        for logger in loggers:
            logger.log_metrics({"loss": step / 3}, step)
    log_result(loggers, {"metrics": {"validation": {"accuracy": 0.5}}})
    finish(loggers)
    print("trained", name)
"""


def run_program(folder: Path, room: int, **variables: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(room)]
    environment = os.environ | {"PYTHONPATH": ROOT} | variables
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150)
    assert done.returncode == 0, done.stderr
    return (done.stdout + done.stderr).splitlines()


@pytest.mark.usefixtures("warm")
def test_one_line_per_run_and_no_files_in_the_home_folder(tmp_path: Path) -> None:
    lines = run_program(tmp_path / "job", -1)
    assert len(lines) == 4 and lines[1::2] == ["trained rte", "trained mrpc"]
    assert all("W&B is offline" in line for line in lines[::2])
    here = [path.relative_to(Path.cwd()) for path in Path.cwd().rglob("*") if path.is_file()]
    assert all(path.parts[:2] == ("cache", "wandb") for path in here), here  # the log of W&B's own service


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("room", [0, pytest.param(600, marks=pytest.mark.slow)])
def test_full_disk(tmp_path: Path, room: int) -> None:
    """If W&B's service cannot write the file with its port, W&B 0.31 itself waits forever."""
    lines = run_program(tmp_path / "runs", room, WANDB__SERVICE_WAIT="10")
    assert [line for line in lines if "trained" in line] == ["trained rte", "trained mrpc"]
    assert len(lines) <= 6
    if room == 0:
        assert sum("W&B could not start (" in line for line in lines) == 2


def test_unfinished_job_does_not_log_metrics_of_the_next(tmp_path: Path) -> None:
    first = start(tmp_path / "one", "one")
    second = start(tmp_path / "two", "two")
    second[0].log_metrics({"loss": 2.0}, 0)
    first[0].log_metrics({"loss": 1.0}, 0)  # finished by the second start
    finish(second, 0)
    finish(first, 1)
    assert [row["loss"] for row in history(tmp_path / "two")] == [2.0]
    assert history(tmp_path / "one") == []


@pytest.mark.parametrize(
    ("environment", "setting", "runs"),
    [
        ("offline", None, 1),
        ("dryrun", None, 1),
        ("online", "offline", 1),
        ("disabled", "offline", 1),
        ("online", "disabled", 0),
        ("disabled", None, 0),
    ],
)
def test_modes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: str, setting: str | None, runs: int
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", environment)
    finish(start(tmp_path, mode=setting))
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == runs
    assert os.environ["WANDB_MODE"] == environment


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("closed", "deadline exceeded"),
        (401, "error 401"),
        ("silent", "deadline exceeded"),
        pytest.param(500, "HTTP 500", marks=pytest.mark.slow),
    ],
)
def test_unusable_server_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int | str, reason: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with wandb_server(None if status == "closed" else status) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        if status == "closed":
            server.stop()
        started = time.monotonic()
        for name in ("rte", "mrpc"):
            loggers = start(tmp_path / name, init_timeout=2)
            loggers[0].log_metrics({"loss": 1.0}, 0)
            finish(loggers)
            monkeypatch.setattr(wandb_run, "missing_key", lambda: pytest.fail("not asked again"))
        assert time.monotonic() - started < 15
    lines = notices(caplog)
    assert len(lines) == 2 and all("W&B is offline (" in line and reason in line for line in lines)
    for name in ("rte", "mrpc"):  # the online attempt is removed
        (folder,) = tmp_path.glob(f"{name}/wandb/*run-*")
        assert folder.name.startswith("offline-run")
    assert [row["loss"] for row in history(tmp_path / "rte")] == [1.0]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("WANDB_BASE_URL", url) for url in ("api.wandb.ai", "", "  ", "http://127.0.0.1:99999", "http://")),
        *(("WANDB_BASE_URL", url) for url in ("ftp://127.0.0.1", "http://a b")),
        *(("WANDB_MODE", mode) for mode in ("ofline", "\x1b[31m")),
    ],
)
def test_malformed_variables(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    problem = wandb_run._drop_malformed_variables()
    assert problem is not None and problem.startswith(f"{variable}=") and " should be " in problem
    assert problem.isprintable() and variable not in os.environ
    assert wandb_run._drop_malformed_variables() is None


def test_a_malformed_url_means_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "127.0.0.1:8080")
    monkeypatch.setenv("WANDB_DIR", "/proc/none")
    finish(start(tmp_path))
    (line,) = notices(caplog)
    assert "W&B is offline (WANDB_BASE_URL=127.0.0.1:8080: " in line
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_a_malformed_key_means_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "nonsense")
    finish(start(tmp_path))
    assert "W&B is offline (WANDB_API_KEY invalid" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [("project", ""), ("project", "a/b"), ("project", "x" * 129), ("entity", " "), ("entity", "a\x1b"), ("mode", "on")],
)
def test_malformed_settings_are_refused(key: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"^logger\.wandb\.{key}="):
        WandbConfig(**dict[str, Any]({key: value}))


def test_one_notice_per_sweep(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state.sweep = tmp_path
    for job in ("0-a", "1-b"):
        wandb_run.report_offline("a reason", tmp_path / job)
    state.reset()  # the next command
    wandb_run.report_offline("a reason", tmp_path / "c")
    assert notices(caplog) == [
        f"W&B is offline (a reason); upload the {what} later with `python -m fusion.sync runs={folder}`"
        for what, folder in (("runs of this sweep", tmp_path), ("run", tmp_path / "c"))
    ]


def test_key_in_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        netrc = Path(os.environ["NETRC"])
        netrc.write_text(f"machine 127.0.0.1:{server.server_port}\nlogin user\npassword {KEY}\n")
        netrc.chmod(0o600)
        finish(start(tmp_path))
        assert [run["groupName"] for run in server.runs] == ["sweep"]


def test_online(server: WandbServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("rte", "mrpc"):
        loggers = start(tmp_path / name, name)
        loggers[0].log_metrics({"loss": 1.0}, 0)
        folder = tmp_path / "store" / name
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(b"weights")
        log_made(loggers, folder, manifest(name, "b", "fusion"), [manifest("mnli", "a")])
        finish(loggers)
    assert [(run["displayName"], run["groupName"], run["jobType"]) for run in server.runs] == [
        ("rte", "sweep", "stage1"),
        ("mrpc", "sweep", "stage1"),
    ]
    assert len({run["name"] for run in server.runs}) == 2
    assert server.asked_artifacts == [f"mnli:{'a' * 12}"] * 2
    made = [(one["artifactCollectionName"], one["artifactTypeName"]) for one in server.artifacts]
    assert made == [("rte", "fusion"), ("mrpc", "fusion")]
    assert {alias["alias"] for alias in server.artifacts[0]["aliases"]} == {"latest", "b" * 12}
    lines = notices(caplog)
    assert len(lines) == 2
    assert all(line.startswith(f"W&B: {server.url}/entity/project/runs/") for line in lines)
    assert summary(tmp_path / "rte")["config"]["artifact"]["sources"] == [{"name": "mnli", "hash": "a" * 64}]
    staged = Path(os.environ["WANDB_DATA_DIR"])
    assert not staged.exists() or not [path for path in staged.rglob("*") if path.is_file()]


def test_a_manifest_without_a_valid_run(tmp_path: Path) -> None:
    loggers = start(tmp_path)
    for run in (None, {"id": 3}, {"project": "p"}):
        log_made(loggers, tmp_path, manifest("rte", "b", "fusion"), [manifest("mnli", "a", run=run)])
        (file,) = tmp_path.glob("wandb/links.json")
        assert json.loads(file.read_text())["used"] == [{"name": "mnli", "hash": "a" * 64, "run": None}]
        file.unlink()
    finish(loggers)


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 2.0)
    monkeypatch.setattr(loggers_module, "LINK_SECONDS", 1.0)


@pytest.mark.parametrize("how", ["silent", "closed"])
def test_a_server_lost_during_the_run(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    assert wandb_run.FINISH_SECONDS + loggers_module.LINK_SECONDS <= 40
    shorten(monkeypatch)
    folder = tmp_path / "store"
    folder.mkdir()
    loggers = start(tmp_path / "rte")
    if how == "silent":
        server.status = "silent"
    else:
        server.stop()
    started = time.monotonic()
    loggers[0].log_metrics({"loss": 1.0}, 0)
    log_result(loggers, {"metrics": {}})
    log_made(loggers, folder, manifest("rte", "b", "fusion"), [manifest(name, "a") for name in ("mnli", "snli")])
    finish(loggers)
    assert time.monotonic() - started < 10
    lines = notices(caplog)
    assert any("could not link the artifacts (the server did not respond" in line for line in lines)
    assert any("could not upload all of the run" in line and "wandb sync " in line for line in lines)
    server.status = None  # the remaining jobs of the sweep stay offline, and wait for nothing
    started = time.monotonic()
    finish(start(tmp_path / "mrpc", "mrpc", init_timeout=30))
    assert time.monotonic() - started < 12
    assert len(list(tmp_path.glob("mrpc/wandb/offline-run-*"))) == 1
    assert [run["displayName"] for run in server.runs] == ["rte"]


@pytest.mark.parametrize("how", ["silent", pytest.param("closed", marks=pytest.mark.slow)])
def test_two_jobs_train_when_the_server_is_lost_in_the_first(
    server: WandbServer, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    import fusion.training.stage as stage

    def lose(*args: Any, **kwargs: Any) -> list[Logger]:
        loggers = build_loggers(*args, **kwargs)
        if how == "silent":
            server.status = "silent"
        else:
            server.stop()
        return loggers

    shorten(monkeypatch)
    monkeypatch.setattr(stage, "build_loggers", lose)
    for name in ("films", "books"):
        result = bench.stage1(name, logger=LoggerConfig(wandb=WandbConfig(init_timeout=20)))
        assert Path(result["artifact"]).is_dir() and result["metrics"]["validation"]
        monkeypatch.setattr(stage, "build_loggers", build_loggers)
    assert len(server.runs) == 1
    (offline,) = (bench.folder / "runs" / "2").glob("wandb/offline-run-*")
    assert list(offline.glob("*.wandb"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the service in /proc")
def test_killed_service(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """W&B's own process is killed: this job continues without it, and the next has a run again."""
    loggers = start(tmp_path / "rte")
    children = [int(pid) for t in Path("/proc/self/task").iterdir() for pid in (t / "children").read_text().split()]
    services = {pid for pid in children if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()}
    assert len(services) == 1
    os.kill(services.pop(), signal.SIGKILL)
    time.sleep(0.5)
    for step in range(3):
        loggers[0].log_metrics({"loss": 1.0}, step)
    log_result(loggers, {"metrics": {}})
    finish(loggers, 0)
    loggers = start(tmp_path / "mrpc", "mrpc")
    loggers[0].log_metrics({"loss": 1.0}, 0)
    finish(loggers)
    assert len(history(tmp_path / "mrpc")) == 1


def test_wandb_that_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(wandb, "init", fails)
        assert start(tmp_path) == []
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        assert start(tmp_path) == []
    lines = notices(caplog)
    assert len(lines) == 2 and all("W&B could not start" in line for line in lines)


class Line(pytorch_lightning.LightningModule):
    """The smallest model that trains and logs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = (self.weight * batch[0]).sum()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(loggers: list[Logger], directory: Path) -> pytorch_lightning.Trainer:
    options = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = pytorch_lightning.Trainer(
        max_epochs=1,
        logger=loggers,
        log_every_n_steps=1,
        accelerator="cpu",
        default_root_dir=directory,
        **dict[str, Any](options),
    )
    data = torch.utils.data.TensorDataset(torch.ones(4))
    trainer.fit(Line(), torch.utils.data.DataLoader(data, batch_size=1))
    return trainer


def test_training_with_both_loggers(tmp_path: Path) -> None:
    loggers = start(tmp_path, csv=True)
    assert isinstance(loggers[0], WandbLogger) and isinstance(loggers[1], CSVLogger)
    assert fit(loggers, tmp_path).global_step == 4
    metrics = {"validation": {"accuracy": 0.5}}
    log_result(loggers, {"metrics": metrics, "speed": {"seconds": 2.5}, "artifact": "a/b"})
    finish(loggers)
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    shown = summary(tmp_path)["summary"]
    values = [shown[key] for key in ("validation/accuracy", "speed/seconds", "artifact")]
    assert values == [0.5, 2.5, "a/b"]
    least = min(float(row["train/loss"]) for row in rows)
    assert shown["train/loss"] == {"min": pytest.approx(least)}


def test_loggers_that_raise_do_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loggers = start(tmp_path, csv=True)
    assert isinstance(loggers[1], CSVLogger)
    writer = type(loggers[1].experiment)
    for owner, method in ((wandb.Run, "log"), (wandb.Run, "define_metric"), (writer, "save")):
        monkeypatch.setattr(owner, method, fails)
    assert fit(loggers, tmp_path).global_step == 4
    loggers[0].log_hyperparams({"a": 1})
    finish(loggers, 0)
    lines = notices(caplog)
    for name in ("W&B", "CSV"):
        assert sum(f"the {name} logger failed (the disk is full)" in line for line in lines) == 1


def test_only_the_first_rank_logs(tmp_path: Path) -> None:
    assert start(tmp_path / "job", csv=True, rank_zero=False) == []
    assert not (tmp_path / "job").exists()
    assert len(start(tmp_path / "job", csv=True, mode="disabled")) == 1
    finish([], 0)
    log_result([], {})

"""W&B and CSV: each job has a run of its own, and nothing that W&B does stops or delays training."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
import wandb
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger

from fusion.config.logger import CsvConfig, LoggerConfig, WandbConfig
from fusion.errors import UserError
from fusion.tracking import decision, tracking
from fusion.tracking.tracking import build_loggers, finish, log_lineage, log_result
from tests.bench import Bench
from tests.tracking.wandb_server import WandbServer, wandb_server

KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no settings, no network variables of whoever runs the tests; a W&B session of each test's own."""
    for variable in list(os.environ):
        if variable.startswith("WANDB_") or variable.lower().endswith("_proxy"):
            monkeypatch.delenv(variable)
    for variable in tracking.RANK_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(decision, "_reason", None)
    monkeypatch.delenv(decision.VARIABLE, raising=False)
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(home / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(home / "data"))
    monkeypatch.chdir(home)
    yield
    with contextlib.suppress(Exception):  # a test may have ended the service
        wandb.teardown()


def start(directory: Path, name: str = "rte", **options: Any) -> list[Logger]:
    config = LoggerConfig(wandb=WandbConfig(**({"init_timeout": 20} | options)))
    return build_loggers(
        config,
        directory=directory,
        name=name,
        group="sweep",
        job_type="stage1",
        tags=["rte", "minilm", "adapter", "", "x" * 80],
        config_values={"optim": {"lr": 1e-4}, "store": Path("outputs/store"), "sources": ("a", "b")},
    )


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == tracking.__name__]


@lru_cache
def inspect(directory: Path, *options: str) -> str:
    """What `wandb leet inspect` reads from the only run under DIRECTORY/wandb."""
    (path,) = [p for p in directory.glob("wandb/*run-*/*.wandb")]
    program = Path(sysconfig.get_path("scripts")) / "wandb"
    command = [sys.executable, str(program), "leet", "inspect", "--json", *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def records(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in inspect(directory).splitlines()]
    return [line[kind] for line in lines if line["type"] == kind]


def summary(directory: Path) -> dict[str, Any]:
    return json.loads(inspect(directory, "--summary"))


def test_two_jobs_of_one_process_have_two_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=tracking.__name__)
    for number, name in enumerate(("rte", "mrpc")):
        loggers = start(tmp_path / name, name)
        assert [type(logger).__name__ for logger in loggers] == ["SafeWandbLogger"]
        for step in range(3):
            loggers[0].log_metrics({"train/loss": float(number)}, step)
        finish(loggers, exit_code=number)
    for number, name in enumerate(("rte", "mrpc")):
        (run,) = records(tmp_path / name, "run")
        assert run["display_name"] == name
        assert (
            run["run_group"] == "sweep" and run["job_type"] == "stage1" and run["project"] == "adapter-fusion"
        )
        assert run["tags"] == ["rte", "minilm", "adapter", "x" * 64]
        config = run["config"]["update"]
        assert config["optim/lr"] == 1e-4
        assert config["store"] == "outputs/store" and config["sources"] == ["a", "b"]
        history = [record["item"] for record in records(tmp_path / name, "history")]
        assert [(item["train/loss"], item["trainer/global_step"]) for item in history] == [
            (number, step) for step in range(3)
        ]
        assert records(tmp_path / name, "exit")[0].get("exit_code", 0) == number
        metrics = records(tmp_path / name, "metric")
        assert any(metric.get("step_metric") == "trainer/global_step" for metric in metrics)
    lines = said(caplog)
    assert len(lines) == 2 and all("W&B is offline (no API key is set" in line for line in lines)
    assert f"python -m fusion.sync runs={tmp_path / 'mrpc'}`" in lines[1]
    assert next((tmp_path / "mrpc").glob("wandb/offline-run-*")).is_dir()
    assert "WANDB_MODE" not in os.environ


@pytest.mark.usefixtures("warm")
def test_it_says_one_line_and_keeps_to_its_folder(tmp_path: Path) -> None:
    code = f"""
import logging
from pathlib import Path
from fusion.config.logger import LoggerConfig, WandbConfig
from fusion.tracking.tracking import *
logging.basicConfig(level=logging.INFO)
loggers = build_loggers(LoggerConfig(wandb=WandbConfig()), directory=Path({str(tmp_path / "job")!r}), name="rte",
                        group="g", job_type="stage1", tags=[], config_values={{}})
loggers[0].log_metrics({{"loss": 1.0}}, 0)
log_result(loggers, {{"metrics": {{"validation": {{"accuracy": 0.5}}}}}})
finish(loggers, 0)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) == 1 and "W&B is offline" in lines[0]
    here = [path.relative_to(Path.cwd()) for path in Path.cwd().rglob("*") if path.is_file()]
    assert all(path.parts[:2] == ("cache", "wandb") for path in here), here  # the log of W&B's own service


def test_a_job_that_was_never_finished_does_not_take_the_next_one_in(tmp_path: Path) -> None:
    first = start(tmp_path / "one", "one")
    second = start(tmp_path / "two", "two")
    second[0].log_metrics({"loss": 2.0}, 0)
    first[0].log_metrics({"loss": 1.0}, 0)  # too late, and no reason to stop
    finish(second, 0)
    finish(first, 1)
    assert [record["item"]["loss"] for record in records(tmp_path / "two", "history")] == [2.0]
    assert records(tmp_path / "one", "history") == []


@pytest.mark.parametrize(
    ("environment", "setting"),
    [("offline", None), ("dryrun", None), ("online", "offline"), ("disabled", "offline")],
)
def test_offline_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: str, setting: str | None
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", environment)
    loggers = start(tmp_path, mode=setting)
    finish(loggers)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    assert os.environ["WANDB_MODE"] == environment


def test_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(tmp_path / "a", mode="disabled") == []
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        assert start(tmp_path / "b") == []
    loggers = start(tmp_path / "c")  # the next job is asked anew
    assert len(loggers) == 1
    finish(loggers)


def test_a_closed_port_means_offline_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    caplog.set_level(logging.INFO, logger=tracking.__name__)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    started = time.monotonic()
    loggers = start(tmp_path)
    loggers[0].log_metrics({"loss": 1.0}, 0)
    finish(loggers)
    assert time.monotonic() - started < 15
    assert "127.0.0.1 is out of reach" in caplog.text
    assert [record["item"]["loss"] for record in records(tmp_path, "history")] == [1.0]


@pytest.mark.parametrize("status", [401, "silent"])
def test_a_server_that_refuses_or_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int | str
) -> None:
    caplog.set_level(logging.INFO, logger=tracking.__name__)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracking, "PROBE_SECONDS", 1.0)
    with wandb_server(status) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        started = time.monotonic()
        loggers = start(tmp_path, init_timeout=3)
        assert time.monotonic() - started < 12
        finish(loggers)
    expected = "refused the API key (401)" if status == 401 else "does not answer within 1 s"
    assert f"W&B is offline (127.0.0.1 {expected}" in caplog.text
    (folder,) = tmp_path.glob("wandb/*run-*")  # nothing is left of the first try
    assert folder.name.startswith("offline-run")


class Broken:
    """A server that accepts connections, and then does `how`."""

    def __init__(self, how: str) -> None:
        self.how, self.accepted = how, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if self.how == "drips":
                for byte in b"HTTP/1.1 200 OK\r\n" + b"x" * 200:
                    connection.send(bytes([byte]))
                    time.sleep(0.1)
            elif self.how == "nonsense":
                connection.send(b"\x1b[2J\r\n\r\n")
            elif self.how == "silent":
                connection.settimeout(30)
                while connection.recv(4096):
                    pass


@pytest.mark.parametrize("how", ["silent", "drips", "closes", "nonsense", 500])
def test_a_broken_server_costs_one_probe_for_all_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str | int
) -> None:
    caplog.set_level(logging.INFO, logger=tracking.__name__)
    monkeypatch.setattr(tracking, "PROBE_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with contextlib.ExitStack() as stack:
        if how == 500:
            monkeypatch.setenv("WANDB_BASE_URL", stack.enter_context(wandb_server(500)).url)
        else:
            broken = Broken(str(how))
            stack.callback(broken.socket.close)
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{broken.socket.getsockname()[1]}")
        started = time.monotonic()
        assert (reason := tracking.no_answer()) is not None and "127.0.0.1 " in reason
        assert time.monotonic() - started < 5
        for name in ("rte", "mrpc"):
            monkeypatch.setattr(tracking, "_init", lambda config, mode, *reason, **labels: mode)
            assert tracking._start_run(WandbConfig(), dir=str(tmp_path / name)) == "offline"
            monkeypatch.setattr(tracking, "no_answer", lambda: pytest.fail("the server is asked once"))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("WANDB_BASE_URL", "api.wandb.ai"),
        ("WANDB_BASE_URL", ""),
        ("WANDB_BASE_URL", "  "),
        ("WANDB_BASE_URL", "http://127.0.0.1:99999"),
        ("WANDB_BASE_URL", "http://"),
        ("WANDB_BASE_URL", "ftp://127.0.0.1"),
        ("WANDB_BASE_URL", "http://a b"),
        ("WANDB_MODE", "ofline"),
        ("WANDB_MODE", "\x1b[31m"),
    ],
)
def test_malformed_variables(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    problem = tracking._malformed()
    assert problem is not None and problem.startswith(f"{variable}=") and "expected" in problem
    assert problem.isprintable() and variable not in os.environ
    assert tracking._malformed() is None


def test_a_malformed_url_means_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=tracking.__name__)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "127.0.0.1:8080")
    monkeypatch.setenv("WANDB_DIR", "/proc/none")
    finish(start(tmp_path))
    (line,) = said(caplog)
    assert "W&B is offline (WANDB_BASE_URL=127.0.0.1:8080: it has no http:// or https://" in line
    assert "validation error" not in caplog.text
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("project", ""),
        ("project", "a/b"),
        ("project", "x" * 129),
        ("entity", " "),
        ("entity", "a\x1b"),
        ("mode", "on"),
    ],
)
def test_malformed_settings_are_refused(key: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"^logger\.wandb\.{key}="):
        WandbConfig(**dict[str, Any]({key: value}))


def test_the_decision_is_shared_with_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from fusion.tracking.decision import *; print(offline_reason()); remember_offline('silent')"
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    with decision.shared_decision():
        said = [
            subprocess.run(
                [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
            )
            for _ in range(2)
        ]
        assert [done.stdout.strip() for done in said] == ["None", "silent"]
        assert decision.offline_reason() == "silent"
    assert decision.VARIABLE not in os.environ


def test_a_sweep_reports_once_that_it_is_offline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=tracking.__name__)
    with decision.shared_decision():
        decision.name_sweep(tmp_path)
        for job in ("0-a", "1-b"):
            tracking._report_offline("it is silent", tmp_path / job)
    line = f"W&B is offline (it is silent): `python -m fusion.sync runs={tmp_path}` uploads the runs of this sweep later"
    assert said(caplog) == [line]
    with decision.shared_decision():  # the next command
        tracking._report_offline("it is silent", tmp_path / "c")
    assert said(caplog)[1:] == [
        line.replace(str(tmp_path), str(tmp_path / "c")).replace("runs of this sweep", "run")
    ]


def test_a_key_that_is_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=tracking.__name__)
    monkeypatch.setenv("WANDB_API_KEY", "nonsense")
    finish(start(tmp_path))
    assert "W&B is offline (WANDB_API_KEY invalid" in caplog.text


def test_a_key_in_netrc_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        Path(os.environ["NETRC"]).write_text(
            f"machine 127.0.0.1:{server.server_port}\nlogin user\npassword {KEY}\n"
        )
        Path(os.environ["NETRC"]).chmod(0o600)
        finish(start(tmp_path))
        assert [run["groupName"] for run in server.runs] == ["sweep"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server


def test_online(server: WandbServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=tracking.__name__)
    for name in ("rte", "mrpc"):
        loggers = start(tmp_path / name, name)
        loggers[0].log_metrics({"loss": 1.0}, 0)
        folder = tmp_path / "store" / name
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(b"weights")
        sources = [{"name": "mnli", "hash": "a" * 64}]
        log_lineage(loggers, folder=folder, kind="fusion", name=name, hash="b" * 64, sources=sources)
        finish(loggers)
    assert [(run["displayName"], run["groupName"], run["jobType"]) for run in server.runs] == [
        ("rte", "sweep", "stage1"),
        ("mrpc", "sweep", "stage1"),
    ]
    assert len({run["name"] for run in server.runs}) == 2
    assert server.asked_artifacts == [f"mnli:{'a' * 12}"] * 2
    assert [(a["artifactCollectionName"], a["artifactTypeName"]) for a in server.artifacts] == [
        ("rte", "fusion"),
        ("mrpc", "fusion"),
    ]
    assert {alias["alias"] for alias in server.artifacts[0]["aliases"]} == {"latest", "b" * 12}
    lines = said(caplog)
    assert len(lines) == 2
    assert all(line.startswith(f"W&B: {server.url}/entity/project/runs/") for line in lines)
    assert summary(tmp_path / "rte")["config"]["artifact"]["sources"] == sources
    staged = Path(os.environ["WANDB_DATA_DIR"])
    assert not staged.exists() or not [path for path in staged.rglob("*") if path.is_file()]


def test_a_manifest_that_names_no_run(tmp_path: Path) -> None:
    """What stands in somebody's manifest stops no training that is done."""
    loggers = start(tmp_path)
    anything: list[Any] = [None, "abc", [], {"id": 3}, {"project": "p"}]
    for run in anything:
        sources = [{"name": "mnli", "hash": "a" * 64, "run": run}]
        log_lineage(loggers, folder=tmp_path, kind="fusion", name="rte", hash="b" * 64, sources=sources)
        (file,) = tmp_path.glob("wandb/links.json")
        assert json.loads(file.read_text())["used"] == [sources[0] | {"run": None}]
        file.unlink()
    finish(loggers)


def test_a_server_lost_in_mid_run(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 2.0)
    loggers = start(tmp_path / "rte")
    server.stop()
    started = time.monotonic()
    loggers[0].log_metrics({"loss": 1.0}, 0)
    log_result(loggers, {"metrics": {}})
    log_lineage(loggers, folder=tmp_path, kind="adapter", name="rte", hash="b" * 64, sources=[])
    finish(loggers)
    assert time.monotonic() - started < 15
    lines = said(caplog)
    assert any("could not link the artifacts (127.0.0.1 is out of reach" in line for line in lines)
    assert any("could not upload all of the run" in line and "wandb sync " in line for line in lines)
    loggers = start(tmp_path / "mrpc", "mrpc")  # the next job of the sweep
    finish(loggers)
    assert len(list(tmp_path.glob("mrpc/wandb/offline-run-*"))) == 1


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("FINISH_SECONDS", 2.0), ("LINK_SECONDS", 1.0), ("PROBE_SECONDS", 2.0)):
        monkeypatch.setattr(tracking, name, seconds)


def test_a_server_that_stops_answering(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes connections and says nothing: each question would wait. The sweep's next job waits less."""
    settings = (
        tracking.PROBE_SECONDS,
        tracking.LINK_SECONDS,
        tracking.FINISH_SECONDS,
    )
    assert sum(settings) <= 40
    shorten(monkeypatch)
    folder = tmp_path / "store"
    folder.mkdir()
    loggers = start(tmp_path / "rte")
    server.status = "silent"
    started = time.monotonic()
    loggers[0].log_metrics({"loss": 1.0}, 0)
    log_result(loggers, {"metrics": {}})
    sources = [{"name": name, "hash": "a" * 64} for name in ("mnli", "snli")]
    log_lineage(loggers, folder=folder, kind="fusion", name="rte", hash="b" * 64, sources=sources)
    finish(loggers)
    assert time.monotonic() - started < 10
    lines = said(caplog)
    assert any("could not link the artifacts (the server is slow" in line for line in lines)
    assert any("could not upload all of the run" in line for line in lines)
    started = time.monotonic()
    finish(start(tmp_path / "mrpc", "mrpc", init_timeout=30))
    assert time.monotonic() - started < 12
    assert len(list(tmp_path.glob("mrpc/wandb/offline-run-*"))) == 1
    server.status = None  # it is back, and the sweep's other jobs stay offline all the same
    finish(start(tmp_path / "cb", "cb"))
    assert [run["displayName"] for run in server.runs] == ["rte"]


@pytest.mark.parametrize("how", ["silent", pytest.param("gone", marks=pytest.mark.slow)])
def test_two_jobs_train_on_when_the_server_is_lost_in_the_first(
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


FULL = """
import logging, resource, sys
from pathlib import Path
from fusion.config.logger import LoggerConfig, WandbConfig
from fusion.tracking.tracking import *
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
for name in ("rte", "mrpc"):
    loggers = build_loggers(LoggerConfig(wandb=WandbConfig()), directory=Path(sys.argv[1]) / name, name=name,
                            group="g", job_type="stage1", tags=[], config_values={})
    for step in range(100):
        for logger in loggers:
            logger.log_metrics({"loss": step / 3}, step)
    log_result(loggers, {"metrics": {}})
    finish(loggers)
    print("trained", name)
"""


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("room", [0, pytest.param(600, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_for_wandb_too(tmp_path: Path, room: int) -> None:
    """Without room for the file by which W&B's service says its port, W&B 0.31 itself would wait for ever."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "runs"), str(room)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "WANDB__SERVICE_WAIT": "20"},
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "trained" in line] == ["trained rte", "trained mrpc"]
    assert len(done.stdout.splitlines()) <= 6
    if room == 0:
        assert done.stdout.count("W&B could not start (") == 2


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for the service in /proc")
def test_a_service_that_died(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """W&B's own helper process is gone: this job goes on without, and the next has a run again."""
    loggers = start(tmp_path / "rte")
    children = [
        int(pid) for t in Path("/proc/self/task").iterdir() for pid in (t / "children").read_text().split()
    ]
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
    assert len(records(tmp_path / "mrpc", "history")) == 1


def test_wandb_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(wandb, "init", fails)
        assert start(tmp_path) == []
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        assert start(tmp_path) == []
    lines = said(caplog)
    assert len(lines) == 2 and all("W&B could not start" in line for line in lines)


def fails(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("the disk is full\nand more")


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
    trainer = pytorch_lightning.Trainer(
        max_epochs=1,
        logger=loggers,
        log_every_n_steps=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=directory,
    )
    trainer.fit(
        Line(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4)), batch_size=1)
    )
    return trainer


def both(directory: Path) -> list[Logger]:
    config = LoggerConfig(wandb=WandbConfig(), csv=CsvConfig(flush_every_n_steps=2))
    return build_loggers(
        config, directory=directory, name="rte", group="g", job_type="stage1", tags=[], config_values={}
    )


def test_training_with_both(tmp_path: Path) -> None:
    loggers = both(tmp_path)
    assert isinstance(loggers[0], WandbLogger) and isinstance(loggers[1], CSVLogger)
    assert fit(loggers, tmp_path).global_step == 4
    log_result(
        loggers, {"metrics": {"validation": {"accuracy": 0.5}}, "speed": {"seconds": 2.5}, "artifact": "a/b"}
    )
    finish(loggers)
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    shown = summary(tmp_path)["summary"]
    assert (
        shown["validation/accuracy"] == 0.5 and shown["speed/seconds"] == 2.5 and shown["artifact"] == "a/b"
    )
    least = min(float(row["train/loss"]) for row in rows)
    assert shown["train/loss"] == {"min": pytest.approx(least)}


def test_loggers_that_raise_do_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loggers = both(tmp_path)
    monkeypatch.setattr(wandb.Run, "log", fails)
    monkeypatch.setattr(wandb.Run, "define_metric", fails)
    monkeypatch.setattr(CSVLogger, "save", fails)
    assert fit(loggers, tmp_path).global_step == 4
    loggers[0].log_hyperparams({"a": 1})
    finish(loggers, 0)
    lines = said(caplog)
    assert sum("W&B could not log (the disk is full)" in line for line in lines) == 1
    assert sum("the CSV logger could not log (the disk is full)" in line for line in lines) == 1


def test_none_and_other_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(config: LoggerConfig) -> list[Logger]:
        return build_loggers(
            config, directory=tmp_path, name="rte", group="g", job_type="stage1", tags=[], config_values={}
        )

    assert build(LoggerConfig()) == []
    for variable in tracking.RANK_VARIABLES:
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1")
            assert build(LoggerConfig(wandb=WandbConfig(), csv=CsvConfig())) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "home"]
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert len(build(LoggerConfig(csv=CsvConfig()))) == 1
    finish([], 0)
    log_result([], {})

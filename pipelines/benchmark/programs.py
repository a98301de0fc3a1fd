"""The project's own commands, run one at a time in a folder that is thrown away, and timed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.benchmark.errors import BenchmarkError
from pipelines.benchmark.session import Session
from pipelines.benchmark.workers import worker_environment

POLL_SECONDS = 0.01
EPOCH = re.compile(r"epoch (\d+)/\d+  loss .*?([\d.]+) s\s*$")


@dataclass(frozen=True)
class Outcome:
    """seconds: of the whole process. until: from its start until the watched file was there.

    directory: where the run left result.json, run.log and its CSV.
    """

    seconds: float
    until: float | None
    directory: Path

    @property
    def speed(self) -> dict[str, float]:
        """Of result.json: `seconds` of the fit (evaluation and checkpoints included), `examples_per_second`."""
        return json.loads((self.directory / "result.json").read_text(encoding="utf-8"))["speed"]

    @property
    def artifact(self) -> Path:
        return Path(json.loads((self.directory / "result.json").read_text(encoding="utf-8"))["artifact"])

    def epoch_seconds(self) -> list[float]:
        """What the log says of each epoch, its evaluation included."""
        lines = (self.directory / "run.log").read_text(encoding="utf-8").splitlines()
        return [float(match[2]) for line in lines if (match := EPOCH.search(line))]


def override(key: str, value: Any) -> str:
    """`key="value"`, as Hydra reads it whatever stands in it."""
    return f"{key}={json.dumps(str(value))}"


class Programs:
    """Runs stage 1 and stage 2 with all that is the same in every run of a suite."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.store = session.work / "store"
        self.log = session.output / f"{session.config.suite}-commands.log"
        self.log.write_text("", encoding="utf-8")
        self._number = 0

    def train(
        self, stage: str, task: str, *more: str, threads: int | None = None, watch: str | None = None
    ) -> Outcome:
        """One run of a stage on a task; `watch` names a file of its run folder to wait for."""
        session = self.session
        self._number += 1
        directory = session.work / "runs" / f"{self._number:03d}-{task}"
        limit = session.config.epoch.limit
        overrides = [
            f"+task={task}",
            "backbone=minilm",
            override("backbone.name_or_path", session.setup.backbone),
            "logger=csv",
            override("data.dir", Path(session.config.data_dir).absolute()),
            override("data.cache_dir", session.work / "cache"),
            f"data.batch_size={session.config.batch_size}",
            f"data.max_length={session.config.epoch.max_length}",
            *([f"data.limit.train={limit}", f"data.limit.validation={limit}"] if limit else []),
            override("store", self.store),
            "resume=false",
            "overwrite=true",
            "optim.patience=null",
            f"trainer.accelerator={'gpu' if session.setup.device == 'cuda' else 'cpu'}",
            "trainer.devices=1",
            override("hydra.run.dir", directory),
        ]
        # Of two values of one key the last counts: what is said here stands over what is said above.
        spoken = {word.partition("=")[0] for word in more}
        overrides = [word for word in overrides if word.partition("=")[0] not in spoken]
        seconds, until = self.run(
            f"fusion.{stage}",
            [*overrides, *more],
            threads or session.threads,
            directory / watch if watch else None,
        )
        return Outcome(seconds, until, directory)

    def run(
        self, module: str, arguments: list[str], threads: int, watch: Path | None = None
    ) -> tuple[float, float | None]:
        """Seconds of `python -m MODULE`, and until the file `watch` was there.

        Raises:
            BenchmarkError: it failed or took too long; what it said is in the log.
        """
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ python -m {module} {' '.join(arguments)}\n")
            log.flush()
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=worker_environment(threads),
                start_new_session=True,  # a DDP run has processes of its own, which must end with it
            )
            until = None
            try:
                while process.poll() is None and time.perf_counter() - started < self.session.config.timeout:
                    if watch is not None and until is None and watch.is_file():
                        until = time.perf_counter() - started
                    if watch is None or until is not None:
                        _wait(process, 1.0)
                    else:
                        time.sleep(POLL_SECONDS)
                seconds = time.perf_counter() - started
                late = process.poll() is None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    _wait(process, 30.0)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if late or process.returncode != 0:
            what = (
                f"took more than {self.session.config.timeout:g} s"
                if late
                else f"ended with exit code {process.returncode}"
            )
            raise BenchmarkError(f"python -m {module} {what} (log: {self.log})")
        if watch is not None and until is None:
            raise BenchmarkError(f"python -m {module} left no {watch.name} (log: {self.log})")
        return seconds, until


def _wait(process: subprocess.Popen[Any], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return

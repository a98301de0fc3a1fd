"""Suites that time whole commands: epoch, startup, ddp."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fusion.files import read_json
from fusion.text import key_of, override
from pipelines.benchmark.config import BenchmarkError
from pipelines.benchmark.report import Figure, Report, Target, ratio
from pipelines.benchmark.session import BASELINE, Session, environment
from pipelines.commands import examples

POLL_SECONDS = 0.01
EPOCH = re.compile(r"epoch \d+/\d+ .*?([\d.]+) s$", re.MULTILINE)
ONE_STEP = ("trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1")
# Log and flush every step, so that the file appears right after the first one.
LOG_EVERY_STEP = ("trainer.log_every_n_steps=1", "logger.csv.flush_every_n_steps=1")
RATES = {"stage1": 1e-4, "stage2": 5e-5}  # default learning rates of the commands, used for the baseline too
TARGETS = {"stage1": Target(2.0, at_least=True), "stage2": Target(4.0, at_least=True)}


class Outcome(NamedTuple):
    """Seconds until the command exited or the watched file existed, the run's directory, and `speed` of its result."""

    seconds: float
    directory: Path
    speed: dict[str, float]


class Commands:
    """Runs stage 1 and stage 2 with the settings shared by all runs of a suite."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.log = session.output / f"{session.config.suite}-commands.log"
        self.log.unlink(missing_ok=True)
        self._number = 0

    def train(self, stage: str, task: str, *more: str, threads: int | None = None, watch: str | None = None) -> Outcome:
        """Run a stage on a task; `watch` is the path of a file relative to the run's directory."""
        config, setup, work = self.session.config, self.session.setup, self.session.work
        self._number += 1
        directory = work / "runs" / f"{self._number:03d}-{task}"
        overrides = {
            "backbone.name_or_path": setup.backbone,
            "data.dir": str(Path(config.data_dir).absolute()),
            "data.cache_dir": str(work / "cache"),
            "data.batch_size": config.batch_size,
            "data.max_length": config.epoch.max_length,
            "data.limit.train": config.epoch.limit,
            "data.limit.validation": config.epoch.limit,
            "store": str(work / "store"),
            "resume": False,
            "overwrite": True,
            "optim.patience": None,
            "trainer.accelerator": "gpu" if setup.device == "cuda" else "cpu",
            "trainer.devices": 1,
            "hydra.run.dir": str(directory),
        }
        changed = {key_of(word) for word in more}
        words = [override(key, value) for key, value in overrides.items() if key not in changed]
        arguments = [f"+task={task}", "backbone=minilm", "logger=csv", *words, *more]
        seconds = self.run(f"fusion.{stage}", arguments, threads, directory / watch if watch else None)
        return Outcome(seconds, directory, read_json(directory / "result.json")["speed"])

    def run(self, module: str, arguments: list[str], threads: int | None = None, watch: Path | None = None) -> float:
        """Run `python -m MODULE` and return its seconds, or the seconds until the file `watch` exists."""
        timeout, code, seconds = self.session.config.timeout, None, None
        with self.log.open("a", encoding="utf-8") as log:
            print("$", "python", "-m", module, *arguments, file=log, flush=True)
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(threads or self.session.threads),
                start_new_session=True,
            )
            try:
                while code is None and time.perf_counter() - started < timeout:
                    time.sleep(POLL_SECONDS)
                    code = process.poll()
                    if seconds is None and (code is not None if watch is None else watch.is_file()):
                        seconds = time.perf_counter() - started
            finally:
                with contextlib.suppress(ProcessLookupError):  # including the other ranks of a DDP run
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code != 0:
            problem = f"did not finish within {timeout:g} s" if code is None else f"exited with code {code}"
            raise BenchmarkError(f"python -m {module} {problem} (log: {self.log})")
        if seconds is None:
            raise BenchmarkError(f"python -m {module} did not write {watch} (log: {self.log})")
        return seconds


def epoch(session: Session) -> Report:
    """An epoch of each task with this project's commands and with the baseline's example script.

    Both times cover training and the evaluation after it, without startup, loading and tokenization; both write a
    checkpoint. Also compares later epochs with adapters in the upper half of the layers and in all layers.
    """
    settings, data_dir = session.config.epoch, session.config.data_dir
    commands = Commands(session)
    sources = [f"source-{number}" for number in range(settings.sources)]
    for number, name in enumerate(sources):
        commands.train("stage1", settings.tasks[0], *ONE_STEP, f"name={name}", f"seed={number}")
    for task in settings.tasks:
        commands.train("stage1", task, *ONE_STEP)  # fills the token cache
        rows = {split: examples(task, split, settings.limit, data_dir) for split in ("train", "validation")}
        content = {split: {"texts": one.texts, "labels": one.labels} for split, one in rows.items()}
        (session.work / f"{task}.json").write_text(json.dumps(content), encoding="utf-8")

    def ours(stage: str, task: str) -> float:
        more = [f"sources=[{','.join(sources)}]"] if stage == "stage2" else []
        rate = f"optim.lr={RATES[stage]}"
        return commands.train(stage, task, rate, "trainer.max_epochs=1", *more).speed["seconds"]

    def theirs(stage: str, task: str) -> float:
        seconds: float = session.worker(BASELINE).ask(
            "epoch",
            rows=str(session.work / f"{task}.json"),
            sources=settings.sources if stage == "stage2" else 0,
            rate=RATES[stage],
            max_length=settings.max_length,
            output=str(session.work / "rival"),
        )
        return seconds

    def later(*more: str) -> float:
        """Return the mean seconds of the epochs after the first, including their evaluation."""
        run = commands.train("stage1", last, f"trainer.max_epochs={1 + settings.later_epochs}", *more)
        log = (run.directory / "run.log").read_text(encoding="utf-8")
        return statistics.fmean(float(seconds) for seconds in EPOCH.findall(log)[1:])

    last, layers = settings.tasks[-1], session.backbone.layers
    pairs = list(itertools.product(RATES, settings.tasks))
    parts: dict[str, Callable[[], float]] = {}
    for stage, task in pairs:
        parts[f"ours: {stage} {task}"] = partial(ours, stage, task)
        parts[f"rival: {stage} {task}"] = partial(theirs, stage, task)
    whole, upper = (f"ours: later epoch of {last}, {half}" for half in ("all layers", "upper half"))
    parts |= {whole: later, upper: partial(later, f"adapter.layers=last:{layers - layers // 2}")}
    seconds = session.rounds(parts)
    names = {"stage1": "one adapter", "stage2": f"fusion of {settings.sources}"}
    figures = [
        ratio(
            f"an epoch of {task}, {names[stage]}: the baseline's example over our command",
            seconds[f"rival: {stage} {task}"],
            seconds[f"ours: {stage} {task}"],
            TARGETS[stage],
        )
        for stage, task in pairs
    ]
    what = f"later epochs of {last}, adapters in the upper half of the layers over all layers"
    return Report([*figures, ratio(what, seconds[upper], seconds[whole], Target(0.5))], seconds=seconds)


def startup(session: Session) -> Report:
    """Seconds from starting a command to its first finished step, with cached tokens; seconds of `--help`."""
    commands = Commands(session)
    task = session.config.epoch.tasks[-1]
    commands.train("stage1", task, *ONE_STEP)
    seconds = session.rounds(
        {
            "first step": lambda: (
                commands.train("stage1", task, *ONE_STEP, *LOG_EVERY_STEP, watch="csv/metrics.csv").seconds
            ),
            "--help": lambda: commands.run("fusion.stage1", ["--help"]),
        }
    )
    what = f"stage 1 on {task}, tokens cached: start to first step"
    figures = [
        Figure(what, tuple(seconds["first step"]), Target(10.0), unit="s"),
        Figure("--help", tuple(seconds["--help"]), Target(2.0), unit="s"),
    ]
    return Report(figures, seconds=seconds)


def ddp(session: Session) -> Report:
    """Examples per second of two processes with one thread each over one process with two, on the same batches."""
    commands = Commands(session)
    task, rows = session.config.epoch.tasks[-1], session.config.batch_size
    two = ("trainer.devices=2", "trainer.strategy=ddp", f"data.batch_size={max(1, rows // 2)}")

    def speed(threads: int, *more: str) -> float:
        run = commands.train("stage1", task, "trainer.max_epochs=1", *more, threads=threads)
        return run.speed["examples_per_second"]

    commands.train("stage1", task, *ONE_STEP)
    speeds = session.rounds(
        {"one process, two threads": partial(speed, 2), "two processes, one thread": partial(speed, 1, *two)}
    )
    one_process, two_processes = speeds.values()
    what = "rows a second: two DDP processes of one thread over one of two threads"
    figure = ratio(what, two_processes, one_process, Target(0.9, at_least=True))
    lines = [f"{way}: {statistics.median(values):.1f} rows a second" for way, values in speeds.items()]
    return Report([figure], more={"rows_a_second": speeds}, lines=["", *lines])

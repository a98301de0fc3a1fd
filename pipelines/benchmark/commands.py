"""Suites that time whole commands: epoch, startup, ddp."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fusion.text import key_of, override
from pipelines.benchmark.config import BenchmarkError
from pipelines.benchmark.report import Figure, Report, Target, ratio
from pipelines.benchmark.session import BASELINE, Session, environment

POLL_SECONDS = 0.01
EPOCH = re.compile(r"epoch \d+/\d+ .*?([\d.]+) s$", re.MULTILINE)
ONE_STEP = ("trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1")
# Log and flush every step, so that the file appears right after the first one.
LOG_EVERY_STEP = ("trainer.log_every_n_steps=1", "logger.csv.flush_every_n_steps=1")
RATES = {"stage1": 1e-4, "stage2": 5e-5}  # default learning rates of the commands, used for the baseline too
TARGETS = {"stage1": Target(2.0, at_least=True), "stage2": Target(4.0, at_least=True)}


class Outcome(NamedTuple):
    """Seconds until the command exited or the watched file existed, and the run's directory."""

    seconds: float
    directory: Path

    @property
    def speed(self) -> dict[str, float]:
        """`seconds` of the fit (including evaluation and checkpoints), `examples_per_second` and more."""
        return json.loads((self.directory / "result.json").read_text(encoding="utf-8"))["speed"]


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
        watched = directory / watch if watch else None
        return Outcome(self.run(f"fusion.{stage}", arguments, threads, watched), directory)

    def run(self, module: str, arguments: list[str], threads: int | None = None, watch: Path | None = None) -> float:
        """Run `python -m MODULE` and return its seconds, or the seconds until the file `watch` exists.

        Raises:
            BenchmarkError: if the command fails, times out, or does not write `watch`.
        """
        timeout, seconds = self.session.config.timeout, None
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
                while (code := process.poll()) is None and time.perf_counter() - started < timeout:
                    if watch is not None and seconds is None and watch.is_file():
                        seconds = time.perf_counter() - started
                    time.sleep(POLL_SECONDS)
                ended = time.perf_counter() - started
            finally:
                with contextlib.suppress(ProcessLookupError):  # including the other ranks of a DDP run
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code != 0:
            problem = f"did not finish within {timeout:g} s" if code is None else f"exited with code {code}"
            raise BenchmarkError(f"python -m {module} {problem} (log: {self.log})")
        if watch is not None and seconds is None:
            raise BenchmarkError(f"python -m {module} did not write {watch.name} (log: {self.log})")
        return ended if seconds is None else seconds


def epoch(session: Session) -> Report:
    """An epoch of each task with this project's commands and with the baseline's example script.

    Both times cover training and the evaluation after it, without startup, loading and tokenization; both write a
    checkpoint. Also compares later epochs with adapters in the upper half of the layers and in all layers.
    """
    settings = session.config.epoch
    commands = Commands(session)
    sources = [f"source-{number}" for number in range(settings.sources)]
    for number, name in enumerate(sources):
        commands.train("stage1", settings.tasks[0], *ONE_STEP, f"name={name}", f"seed={number}")
    for task in settings.tasks:
        commands.train("stage1", task, *ONE_STEP)  # fills the token cache
        write_examples(session, task)

    def ours(stage: str, task: str) -> float:
        more = [f"sources=[{','.join(sources)}]"] if stage == "stage2" else []
        rate = f"optim.lr={RATES[stage]}"
        return commands.train(stage, task, rate, "trainer.max_epochs=1", *more).speed["seconds"]

    def theirs(stage: str, task: str) -> float:
        return session.worker(BASELINE).ask(
            "epoch",
            rows=str(session.work / f"{task}.json"),
            sources=settings.sources if stage == "stage2" else 0,
            rate=RATES[stage],
            max_length=settings.max_length,
            output=str(session.work / "rival"),
        )

    layers = session.backbone.layers
    halves = {"all layers": (), "upper half": (f"adapter.layers=last:{layers - layers // 2}",)}

    def later(half: str, task: str) -> float:
        """Return the mean seconds of the epochs after the first, including their evaluation."""
        epochs = f"trainer.max_epochs={1 + settings.later_epochs}"
        run = commands.train("stage1", task, epochs, *halves[half])
        log = (run.directory / "run.log").read_text(encoding="utf-8")
        return statistics.fmean(float(seconds) for seconds in EPOCH.findall(log)[1:])

    last = settings.tasks[-1]
    parts: list[tuple[str, Callable[[str, str], float], str, str]] = [
        (f"{who}: {stage} {task}", measure, stage, task)
        for stage in RATES
        for task in settings.tasks
        for who, measure in (("ours", ours), ("rival", theirs))
    ]
    parts += [(f"ours: later epoch of {last}, {half}", later, half, last) for half in halves]
    seconds: dict[str, list[float]] = {label: [] for label, *_ in parts}
    for label, measure, what, task in session.rounds(parts):
        seconds[label].append(measure(what, task))
    names = {"stage1": "one adapter", "stage2": f"fusion of {settings.sources}"}
    figures = [
        ratio(
            f"an epoch of {task}, {names[stage]}: the baseline's example over our command",
            seconds[f"rival: {stage} {task}"],
            seconds[f"ours: {stage} {task}"],
            TARGETS[stage],
        )
        for stage in RATES
        for task in settings.tasks
    ]
    whole, upper = (seconds[f"ours: later epoch of {last}, {half}"] for half in halves)
    what = f"later epochs of {last}, adapters in the upper half of the layers over all layers"
    return Report([*figures, ratio(what, upper, whole, Target(0.5))], seconds=seconds)


def write_examples(session: Session, task: str) -> None:
    """Write the examples that this project's command reads as JSON for the baseline."""
    import yaml

    from fusion.cli.config_sources import conf_folder
    from fusion.config.data import DataConfig, LimitConfig
    from fusion.config.task import TaskConfig
    from fusion.data.rows import load_rows

    limit = session.config.epoch.limit
    content = yaml.safe_load((conf_folder() / "task" / f"{task}.yaml").read_text(encoding="utf-8"))
    config = TaskConfig.from_dict(content | {"name": task}, where=f"task {task}")
    data = DataConfig(dir=session.config.data_dir, limit=LimitConfig(train=limit, validation=limit))
    splits: dict[str, Any] = {}
    for split in ("train", "validation"):
        rows = load_rows(config, data, split)
        splits[split] = {"texts": rows.texts, "labels": rows.labels}
    (session.work / f"{task}.json").write_text(json.dumps(splits), encoding="utf-8")


def startup(session: Session) -> Report:
    """Seconds from starting a command to its first finished step, with cached tokens; seconds of `--help`."""
    commands = Commands(session)
    task = session.config.epoch.tasks[-1]
    commands.train("stage1", task, *ONE_STEP)
    seconds: dict[str, list[float]] = {"first step": [], "--help": []}
    for part in session.rounds(list(seconds)):
        if part == "--help":
            seconds[part].append(commands.run("fusion.stage1", ["--help"]))
        else:
            run = commands.train("stage1", task, *ONE_STEP, *LOG_EVERY_STEP, watch="csv/metrics.csv")
            seconds[part].append(run.seconds)
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
    ways = {"one process, two threads": (2, ()), "two processes, one thread": (1, two)}
    commands.train("stage1", task, *ONE_STEP)
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for way in session.rounds(list(ways)):
        threads, more = ways[way]
        run = commands.train("stage1", task, "trainer.max_epochs=1", *more, threads=threads)
        speeds[way].append(run.speed["examples_per_second"])
    one_process, two_processes = speeds.values()
    what = "rows a second: two DDP processes of one thread over one of two threads"
    figure = ratio(what, two_processes, one_process, Target(0.9, at_least=True))
    lines = [f"{way}: {statistics.median(values):.1f} rows a second" for way, values in speeds.items()]
    return Report([figure], more={"rows_a_second": speeds}, lines=["", *lines])

"""Every suite by its name, and how one is run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipelines.benchmark import journeys, machine, scale, steps
from pipelines.benchmark.config import BenchmarkConfig
from pipelines.benchmark.report import Report, finish
from pipelines.benchmark.session import Session
from pipelines.commands import say

SUITES: dict[str, Callable[[Session], Report]] = {
    "train": steps.train,
    "infer": steps.infer,
    "scale": scale.scale,
    "memory": steps.memory,
    "epoch": journeys.epoch,
    "startup": journeys.startup,
    "ddp": journeys.ddp,
}


def measure(config: BenchmarkConfig) -> Path:
    """Runs the suite that the config names, prints what it finds and gives the file that keeps it."""
    Path(config.output).mkdir(parents=True, exist_ok=True)
    described = machine.describe(config.thread_count())
    say(
        f"suite {config.suite}: {config.rounds_of_suite()} rounds, {config.thread_count()} threads, "
        f"{described['processor']}"
    )
    with Session(config) as session:
        report = SUITES[config.suite](session)
        return finish(config, report, described, session.versions)

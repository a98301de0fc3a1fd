"""Results of a suite: ratios and times over the rounds with verdicts, printed as tables and written as JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

from fusion.cli.console import show_table
from fusion.files import write_json
from fusion.training.processes import cores
from pipelines.benchmark.cases import Case
from pipelines.benchmark.config import BenchmarkConfig
from pipelines.commands import say

REACHED, NOT_REACHED = "reached", "not reached"
TOO_NOISY, TOO_FEW = "too noisy: no verdict", "one round: no verdict"
PACKAGES = ("torch", "transformers", "pytorch-lightning", "numpy")
Measured = tuple[str, Case]  # a worker and its case
Timings = dict[Measured, list[list[float]]]  # seconds of every step of every round


def spread(values: Sequence[float]) -> float:
    """Return the interquartile range as a fraction of the median."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float((high - low) / median)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the confidence interval of the median of at least 95 %, from the order statistics.

    It assumes no distribution. With fewer than six values, it is their range, which has a lower confidence.
    """
    ordered = sorted(values)
    outside = max(0, int(binom.ppf(0.025, len(values), 0.5)) - 1)  # values on each side
    return ordered[outside], ordered[len(values) - 1 - outside]


def medians(timings: Timings, who: str, case: Case) -> list[float]:
    """Return the median seconds per step of every round."""
    return [statistics.median(seconds) for seconds in timings[who, case]]


@dataclass(frozen=True)
class Target:
    """The limit that the median of a figure should reach."""

    limit: float
    at_least: bool = False

    @property
    def sign(self) -> str:
        return ">=" if self.at_least else "<="

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Figure:
    """A row of the table."""

    what: str
    values: tuple[float, ...]  # one per round
    target: Target | None = None  # `None`: for information only
    exact: bool = False  # a count (bytes), for which a single measurement is enough
    unit: str = "x"  # "x" for a ratio, "%" for a ratio shown as an increase, "s" for seconds

    def verdict(self, noise_limit: float | None = None) -> str:
        """Return the verdict, empty without a target. There is none if the target is within the interval of the median.

        Args:
            noise_limit: also no verdict if the values spread more. `None`: no such limit.
        """
        if self.target is None:
            return ""
        if not self.exact and len(self.values) < 2:
            return TOO_FEW
        low, high = map(self.target.met, interval(self.values))
        if low != high or (noise_limit is not None and spread(self.values) > noise_limit):
            return TOO_NOISY
        return REACHED if low else NOT_REACHED

    def shown(self, value: float) -> str:
        if self.unit == "%":
            return f"{100 * (value - 1):+.1f} %"
        return f"{value:.2f}{' s' if self.unit == 's' else 'x'}"

    def row(self, noise_limit: float | None = None) -> list[str]:
        median, low, high = map(self.shown, (statistics.median(self.values), *interval(self.values)))
        rounds = [low, high, f"{100 * spread(self.values):.0f} %"] if len(self.values) > 1 else ["", "", ""]
        target = f"{self.target.sign} {self.shown(self.target.limit)}" if self.target else ""
        return [self.what, median, *rounds, target, self.verdict(noise_limit)]

    def as_json(self, noise_limit: float | None = None) -> dict[str, Any]:
        return {
            "what": self.what,
            "unit": "seconds" if self.unit == "s" else "ratio",
            "median": statistics.median(self.values),
            "low": min(self.values),
            "high": max(self.values),
            "interval": interval(self.values),
            "spread": spread(self.values),
            "rounds": list(self.values),
            "to_reach": f"{self.target.sign} {self.target.limit:g}" if self.target else None,
            "verdict": self.verdict(noise_limit) or None,
        }


def ratio(
    what: str, above: Iterable[float], below: Iterable[float], target: Target | None = None, **more: Any
) -> Figure:
    """Compare two measurements round by round, so that a slow round affects both alike."""
    return Figure(what, tuple(one / other for one, other in zip(above, below, strict=True)), target, **more)


@dataclass
class Report:
    """Results of a suite."""

    figures: list[Figure]
    timings: Timings = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of whole commands, by round
    more: dict[str, Any] = field(default_factory=dict)  # additional fields of the JSON file
    lines: list[str] = field(default_factory=list)  # printed below the tables


def describe_machine(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cores_allowed": cores(),
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def finish(config: BenchmarkConfig, report: Report, machine: dict[str, Any], versions: dict[str, Any]) -> Path:
    """Print the report, write OUTPUT/SUITE.json and return its path."""
    titles = ["", "median", "interval", "", "spread", "to reach", ""]
    say("")
    show_table([titles, *(figure.row(config.noise_limit) for figure in report.figures)])
    timings = []
    behind = dict(report.seconds)
    for (who, case), rounds in report.timings.items():
        values = medians(report.timings, who, case)
        behind[f"{who}: {case}"] = values
        summary = {"median": statistics.median(values), "spread": spread(values), "rounds": rounds}
        timings.append({"who": who, "case": asdict(case), "what": f"{who}: {case}"} | summary)
    if behind:
        cells = [[what, f"{statistics.median(v):.4f}", f"{100 * spread(v):.0f} %"] for what, v in behind.items()]
        say("")
        show_table([["seconds", "median of the rounds", "spread"], *cells])
    for line in report.lines:
        say(line)
    path = Path(config.output) / f"{config.suite}.json"
    content = {
        "suite": config.suite,
        "figures": [figure.as_json(config.noise_limit) for figure in report.figures],
        "timings": timings,
        "seconds": report.seconds,
        **report.more,
        "machine": machine | {"workers": versions},
        "config": asdict(config),
    }
    write_json(path, content)
    say(f"\nAll results: {path}")
    return path

"""What a suite found: printed as a table and written as JSON, whole or not at all."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fusion.files import write_json
from pipelines.benchmark.config import BenchmarkConfig
from pipelines.benchmark.session import Timings
from pipelines.benchmark.verdicts import Figure, spread
from pipelines.commands import say


@dataclass
class Report:
    """figures: the table. timings, seconds: what is behind it, of steps and of whole commands by round.

    more: whatever else the suite has to keep. lines: what is printed below the table.
    """

    figures: list[Figure]
    timings: Timings = field(default_factory=Timings)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def table(figures: list[Figure], noise_limit: float) -> str:
    """Columns: what, the median, lowest and highest round, what to reach, and the verdict."""
    rows = [("", "median", "low", "high", "spread", "to reach", "")]
    for figure in figures:
        one = len(figure.values) == 1
        rows.append(
            (
                figure.what,
                figure.shown(figure.median),
                "" if one else figure.shown(min(figure.values)),
                "" if one else figure.shown(max(figure.values)),
                "" if one else f"{100 * spread(figure.values):.0f} %",
                figure.shown_target(),
                figure.verdict(noise_limit),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1], strict=True)),
                row[-1],
            ]
        ).rstrip()
        for row in rows
    )


def finish(
    config: BenchmarkConfig, report: Report, machine: dict[str, Any], versions: dict[str, Any]
) -> Path:
    """Prints the report and writes OUTPUT/SUITE.json."""
    say(f"\n{table(report.figures, config.noise_limit)}")
    behind = report.seconds | {
        f"{who}: {case}": report.timings.medians(who, case) for who, case in report.timings.rounds
    }
    if behind:
        say("\nseconds (median and spread of the rounds)")
    for what, rounds in behind.items():
        say(f"  {what:<46} {statistics.median(rounds):9.4f}  {100 * spread(rounds):3.0f} %")
    for line in report.lines:
        say(line)
    content = {
        "suite": config.suite,
        "figures": [figure.as_json(config.noise_limit) for figure in report.figures],
        "timings": report.timings.as_json(),
        "seconds": report.seconds,
        **report.more,
        "machine": machine | {"workers": versions},
        "config": asdict(config),
    }
    path = Path(config.output) / f"{config.suite}.json"
    write_json(path, content)
    say(f"\nEverything: {path}")
    return path

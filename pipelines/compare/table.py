"""Results of a comparison: table for the terminal, Markdown with all commands, JSON, and a figure."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from statistics import fmean, stdev

from fusion.files import write_atomic, write_json
from fusion.store.listing import as_bytes
from pipelines.compare.rows import MULTITASK
from pipelines.compare.trainings import SOURCE_RATE, RowResult
from pipelines.compare.workflow import Workflow

NONE = "–"


def header(rows: Sequence[RowResult]) -> list[str]:
    return [*rows[0].scores, "lr", "trainable", "stored", "s/step", "inference"]


def cells(row: RowResult) -> list[str]:
    from fusion.reporting.wording import mean_of

    return [
        *map(mean_of, row.scores.values()),
        NONE if row.rate is None else f"{row.rate:g}",
        f"{row.trainable:,}" if row.trainable else NONE,
        as_bytes(row.stored_bytes),
        NONE if row.seconds_per_step is None else f"{row.seconds_per_step:.3f}",
        NONE if row.inference is None else f"{row.inference['ratio']:.2f}×",
    ]


def terminal_table(rows: Sequence[RowResult]) -> list[list[str]]:
    columns = header(rows)
    lines = [["", *columns]]
    for group, own in groupby(rows, attrgetter("group")):
        lines += [[group, *[""] * len(columns)], *([f"  {row.id}", *cells(row)] for row in own)]
    return lines


def notes(compared: Workflow) -> list[str]:
    """Describe how scores and costs were measured, and their limitations."""
    config, metric = compared.comparison.config, compared.rows[0].main_metric
    rates, seeds = ", ".join(f"{rate:g}" for rate in config.rates), ", ".join(map(str, config.seeds))
    patience = "without early stopping" if config.patience is None else f"patience {config.patience}"
    budget = f"up to {config.source_rows} examples per task, epochs {config.source_epochs}"
    # Methods with their best learning rate at the edge of the grid.
    edge = [
        row.id
        for row in compared.rows
        if row.rate in (min(config.rates), max(config.rates))
        and len({scores[row.main_metric] for scores in row.grid.values()}) > 1
    ]
    found = [
        "All methods that are trained only on the target had the same budget (pruned fusions: two more epochs): "
        f"epochs {config.epochs}, batch size {config.batch_size}, {patience}, the best of the learning rates {rates} "
        f"by {metric}. Epoch and learning rate were selected on the same validation examples that the scores are "
        "computed on, so all scores are optimistic."
        if config.equal_budget
        else "Each method used the defaults of its command, so learning rates and epochs differ. The best epoch was "
        "selected on the same validation examples that the scores are computed on, so the scores are optimistic."
    ]
    if edge:
        found.append(f"Best learning rate at the edge of the grid, so a wider grid may be better: {', '.join(edge)}.")
    found.append(
        f"Seeds {seeds}: mean ± standard deviation."
        if len(config.seeds) > 1
        else f"One seed ({seeds}): small differences may be due to chance."
    )
    if compared.comparison.need_sources:
        found.append(
            f"Sources {', '.join(config.sources)}: {budget}, learning rate {SOURCE_RATE:g}, trained once for all methods and seeds."
        )
    if any(row.group == MULTITASK for row in compared.rows):
        found.append(f"Multi-task methods: {budget}, one artifact for all tasks.")
    found += compared.notes
    found.append("Trainable: number of trainable parameters. Stored: size of the artifact without its sources.")
    if timing := compared.inference:
        shapes = ", ".join(f"{r} × {t}" for r, t in zip(timing["rows"], timing["tokens"], strict=True))
        found.append(
            "Inference: time per batch relative to the backbone without adapters "
            f"({timing['bare_seconds'] * 1000:.0f} ms, {timing['device']}, threads: {timing['threads']}), median over at "
            f"least {timing['rounds']} interleaved rounds, batches of {shapes} examples × tokens; quartiles in results.json."
        )
    return found


def markdown(compared: Workflow) -> str:
    columns = header(compared.rows)
    lines = [f"# {compared.comparison.target}: {len(compared.rows)} methods", ""]
    lines += [f"| | | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    for group, own in groupby(compared.rows, attrgetter("group")):
        lines.append(f"| **{group}** | | {' | '.join('' for _ in columns)} |")
        lines += [f"| `{row.id}` | {row.title} | {' | '.join(cells(row))} |" for row in own]
    lines += ["", *(f"- {note}" for note in notes(compared)), ""]
    if compared.failures:
        lines += ["## Failed", "", *map("- `{id}` ({what}): {reason}".format_map, compared.failures), ""]
    lines += ["## Commands", ""]
    if compared.source_commands:
        lines += ["Sources:", "", "```", *compared.source_commands, "```", ""]
    for row in compared.rows:
        lines += [f"`{row.id}`, stored as {', '.join(row.artifacts)}:", "", "```", row.command, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def write(compared: Workflow) -> list[Path]:
    """Write table.md and results.json and return their paths."""
    folder = compared.comparison.output
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "table.md", markdown(compared))
    rows = []
    for row in compared.rows:
        spread = {m: stdev(values) if len(values) > 1 else None for m, values in row.scores.items()}
        mean = {metric: fmean(values) for metric, values in row.scores.items()}
        rows.append(asdict(row) | {"mean": mean, "deviation": spread})
    content = {
        "target": compared.comparison.target,
        "config": asdict(compared.comparison.config),
        "words": list(compared.comparison.words),
        "rows": rows,
        "failures": compared.failures,
        "inference": compared.inference,
        "source_commands": compared.source_commands,
        "notes": notes(compared),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers")},
    }
    write_json(folder / "results.json", content)
    return [folder / "table.md", folder / "results.json"]


def draw(compared: Workflow) -> list[Path]:
    """Save picture.png and picture.svg, if anything was trained, and return the path of the first."""
    from fusion.reporting.figures import cost_figure, save

    points = [
        {"method": row.id, "score": row.score, "parameters": row.trainable, "seconds": row.seconds}
        for row in compared.rows
        if row.trainable
    ]
    if not points:
        return []
    figure = cost_figure(points, compared.comparison.target, compared.rows[0].main_metric)
    return save(figure, compared.comparison.output, "picture")[:1]

"""The comparison for a reader: aligned columns for a terminal, Markdown with every command, JSON with everything."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.compare.config import Settings
from pipelines.compare.journey import Compared
from pipelines.compare.rows import GROUPS, MULTITASK
from pipelines.compare.scores import RowResult

NOTHING = "–"


def score_text(values: Sequence[float]) -> str:
    """`0.723`, or with several seeds `0.723 ± 0.012` (the standard deviation of the seeds)."""
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ± {statistics.stdev(values):.3f}"


def bytes_text(count: int) -> str:
    """`4.8 kB`, `1.1 MB`."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 100 * size else f"{count / size:.0f} {unit}"
    return f"{count} B"


def counted(number: int, noun: str) -> str:
    """`1 epoch`, `3 epochs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def header(rows: Sequence[RowResult]) -> list[str]:
    return [*rows[0].scores, "rate", "trained", "stored", "s/step", "inference"]


def figures(row: RowResult) -> list[str]:
    """The cells of a row under `header`."""
    return [
        *(score_text(values) for values in row.scores.values()),
        NOTHING if row.rate is None else f"{row.rate:g}",
        f"{row.trainable:,}" if row.trainable else NOTHING,
        bytes_text(row.stored_bytes),
        NOTHING if row.seconds_per_step is None else f"{row.seconds_per_step:.3f}",
        NOTHING if row.inference is None else f"{row.inference['ratio']:.2f}×",
    ]


def grouped(rows: Sequence[RowResult]) -> dict[str, list[RowResult]]:
    """The rows by group, in the order of both; no group is empty."""
    found = {group: [row for row in rows if row.group == group] for group in GROUPS}
    return {group: members for group, members in found.items() if members}


def terminal_table(rows: Sequence[RowResult]) -> str:
    """Columns of equal width, a heading for each group."""
    lines: list[list[str] | str] = [["", *header(rows)]]
    for group, members in grouped(rows).items():
        lines += [group, *([f"  {row.id}", *figures(row)] for row in members)]
    cells = [line for line in lines if isinstance(line, list)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    shown = []
    for line in lines:
        if isinstance(line, str):
            shown.append(line)
        else:
            numbers = [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
            shown.append("  ".join([line[0].ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(shown)


def at_the_edge(rows: Sequence[RowResult], rates: Sequence[float]) -> list[str]:
    """The rows whose best rate is the lowest or highest of the grid, unless all rates did as well."""
    edges = {min(rates), max(rates)}
    return [
        row.id
        for row in rows
        if row.rate in edges and len({scores[row.main_metric] for scores in row.grid.values()}) > 1
    ]


def notes(settings: Settings, compared: Compared) -> list[str]:
    """What the figures are, and what they are not."""
    config, found = settings.config, []
    metric = compared.rows[0].main_metric
    if config.equal_budget:
        patience = "no early stopping" if config.patience is None else f"patience {config.patience}"
        rates = ", ".join(f"{rate:g}" for rate in config.rates)
        found.append(
            f"Every row that learns from the target alone had the same budget (a pruned fusion two epochs more): at most {counted(config.epochs, 'epoch')} in batches of {config.batch_size}, {patience}, the best of the learning rates "
            f"{rates} by {metric}. Epoch and rate were chosen on the validation rows that are scored here, so all "
            "scores are optimistic, and alike."
        )
        if edge := at_the_edge(compared.rows, config.rates):
            found.append(
                f"Best at the edge of the grid, so that a wider one may be better: {', '.join(edge)}."
            )
    else:
        found.append(
            "Each row had its command's own defaults: rates and epochs differ. The best epoch was chosen on the "
            "validation rows that are scored here, so the scores are optimistic."
        )
    seeds = ", ".join(map(str, config.seeds))
    found.append(
        f"Seeds {seeds}: mean ± standard deviation."
        if len(config.seeds) > 1
        else f"One seed, {seeds}: small differences may be chance."
    )
    if settings.need_sources:
        found.append(
            f"Sources {', '.join(config.sources)}: up to {config.source_rows} rows, {counted(config.source_epochs, 'epoch')}, "
            "rate 0.0005 each, trained once for all rows and seeds."
        )
    if any(row.group == MULTITASK for row in compared.rows):
        found.append(
            f"Multi-task rows saw up to {config.source_rows} rows of each task for {counted(config.source_epochs, 'epoch')}, and one "
            "artifact answers all tasks."
        )
    found += compared.notes
    found.append(
        "Trained: parameters. Stored: the artifact's own files; a combination reads its sources besides."
    )
    if compared.inference:
        timing = compared.inference
        shapes = ", ".join(f"{r} × {t}" for r, t in zip(timing["rows"], timing["tokens"], strict=True))
        timed = [row.inference for row in compared.rows if row.inference is not None]
        spread = statistics.median(figures["high"] - figures["low"] for figures in timed) if timed else 0.0
        found.append(
            f"Inference: seconds of a batch over the bare backbone's ({timing['bare_seconds'] * 1000:.0f} ms, "
            f"{timing['device']}, {counted(timing['threads'], 'thread')}), the median of "
            f"{counted(timing['rounds'], 'round')} in turn over batches of {shapes} rows × tokens; the middle half of a "
            f"row's rounds spans {spread:.2f}×."
        )
    return found


def markdown(settings: Settings, compared: Compared) -> str:
    """The table with its notes, what failed, and the commands of every row."""
    lines = [f"# {settings.target}: {len(compared.rows)} methods", ""]
    if compared.rows:
        columns = header(compared.rows)
        lines += [f"| | | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
        for group, members in grouped(compared.rows).items():
            lines.append(f"| **{group}** | | {' | '.join('' for _ in columns)} |")
            lines += [f"| `{row.id}` | {row.title} | {' | '.join(figures(row))} |" for row in members]
        lines += ["", *(f"- {note}" for note in notes(settings, compared)), ""]
    if compared.failures:
        lines += ["## Failed", ""]
        lines += [f"- `{f.id}`, {f.what}: {f.reason}" for f in compared.failures] + [""]
    lines += ["## Commands", ""]
    if compared.source_commands:
        lines += ["Sources:", "", "```", *compared.source_commands, "```", ""]
    for row in compared.rows:
        lines += [f"`{row.id}`, kept as {', '.join(row.artifacts)}:", "", "```", row.command, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def as_json(settings: Settings, compared: Compared) -> dict[str, Any]:
    """All that is known of the comparison, for a program."""
    return {
        "target": settings.target,
        "config": asdict(settings.config),
        "words": list(settings.words),
        "rows": [asdict(row) | _mean_and_deviation(row) for row in compared.rows],
        "failures": [asdict(failure) for failure in compared.failures],
        "inference": compared.inference,
        "source_commands": compared.source_commands,
        "notes": notes(settings, compared) if compared.rows else compared.notes,
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in ("torch", "transformers")},
    }


def _mean_and_deviation(row: RowResult) -> dict[str, dict[str, float | None]]:
    several = len(next(iter(row.scores.values()))) > 1
    return {
        "mean": {metric: statistics.fmean(values) for metric, values in row.scores.items()},
        "deviation": {m: statistics.stdev(values) if several else None for m, values in row.scores.items()},
    }


def write(settings: Settings, compared: Compared) -> list[Path]:
    """`table.md` and `results.json` in the comparison's folder."""
    settings.output.mkdir(parents=True, exist_ok=True)
    table, results = settings.output / "table.md", settings.output / "results.json"
    table.write_text(markdown(settings, compared), encoding="utf-8")
    text = json.dumps(as_json(settings, compared), indent=2, ensure_ascii=False)
    results.write_text(text + "\n", encoding="utf-8")
    return [table, results]

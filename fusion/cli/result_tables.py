"""Tables of the results of commands: rows of text, titles first, none where there is nothing to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion.cli.console import number, score
from fusion.runs.run import Run
from fusion.runs.sweep import Job
from fusion.store.listing import as_bytes

Row = tuple[str, ...]


def run_table(run: Run, result: Mapping[str, Any]) -> list[Row]:
    """The table of one run."""
    if run.command in ("stage1", "stage2"):
        return trained([(str(result.get("name")), "", result)])
    if run.command == "evaluate":
        return evaluated([("", result)])
    if run.command == "inspect":
        return inspected(result)
    if run.command == "predict":
        cells = (result.get("name"), result.get("rows"), (result.get("speed") or {}).get("seconds"))
        return [("name", "rows", "seconds", "output"), tuple(map(number, (*cells, result.get("output"))))]
    return []  # rank has printed its own tables


def sweep_table(command: str, jobs: Sequence[Job]) -> list[Row]:
    """One table of all jobs of a sweep."""
    if command in ("stage1", "stage2"):
        return trained([(job_name(job), _state(job), job.result) for job in jobs])
    if command == "evaluate" and any(job.result for job in jobs):
        return evaluated([(_state(job), job.result or {"name": job_name(job)}) for job in jobs])
    return []


def job_name(job: Job) -> str:
    return str(job.status.get("name") or Path(job.place).name)


def _state(job: Job) -> str:
    state = str(job.status.get("status") or "no status")
    if state == "done" and job.status.get("before") == "done":
        return "done already"
    return "did not end" if state == "running" else state


def trained(entries: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[Row]:
    """Results of trainings, without the column of states where there are none.

    Args:
        entries: name, state and result of each.
    """
    scores = [
        {
            metric if split == "validation" else f"{split}/{metric}": score(value)
            for split, metrics in (result.get("metrics") or {}).items()
            for metric, value in metrics.items()
        }
        for _, _, result in entries
    ]
    keys = list(dict.fromkeys(key for of_one in scores for key in of_one))
    if not keys:
        return []
    rows = []
    for (name, state, result), of_one in zip(entries, scores, strict=True):
        parameters, speed = result.get("parameters") or {}, result.get("speed") or {}
        stored = parameters.get("stored_bytes")
        rows.append(
            {
                "name": name,
                "state": state,
                "best epoch": number(result.get("best_epoch")) + " (diverged)" * bool(result.get("diverged")),
                **{key: of_one.get(key, "-") for key in keys},
                "trained": number(parameters.get("trainable")),
                "stored": "-" if stored is None else as_bytes(stored),
                "seconds": number(speed.get("seconds")),
            }
        )
    return _table(rows)


def evaluated(entries: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Row]:
    """Evaluations: a row for each split that was scored.

    Args:
        entries: state and result of each.
    """
    splits = [(state, result, result.get("metrics") or {"-": {}}) for state, result in entries]
    keys = dict.fromkeys(key for *_, metrics in splits for values in metrics.values() for key in values)
    if not keys:
        return []
    return _table(
        [
            {
                "name": str(result.get("name")),
                "state": state,
                "split": split,
                **{key: score(values.get(key)) for key in keys},
                "rows": number(result.get("rows")) if len(metrics) == 1 else "-",
            }
            for state, result, metrics in splits
            for split, values in metrics.items()
        ]
    )


def inspected(result: Mapping[str, Any]) -> list[Row]:
    """Of each source its mean attention weight, and the first metric without it, with the interval of the change.

    A change is inconclusive where its 95 % bootstrap interval over the examples contains zero or is undefined.
    """
    metric, full = next(iter(next(iter(result["metrics"].values())).items()))
    table: list[Row] = [("source", "attention", f"{metric} without it", "change", "95% interval")]
    intervals = result.get("intervals")  # which version 0.1 did not store
    for source, weight in result["attention"].items():
        without = result["masked"].get(source)
        change = "-" if without is None else f"{without - full:+.4f}"
        interval = "-" if without is None or intervals is None else _interval(*intervals[source])
        table.append((source, score(weight), score(without), change, interval))
    return table


def _interval(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "none, inconclusive"
    return f"{low:+.4f} to {high:+.4f}{', inconclusive' if low <= 0 <= high else ''}"


def _table(rows: Sequence[dict[str, str]]) -> list[Row]:
    if not any(row["state"] for row in rows):
        rows = [{key: cell for key, cell in row.items() if key != "state"} for row in rows]
    return [tuple(rows[0]), *(tuple(row.values()) for row in rows)]

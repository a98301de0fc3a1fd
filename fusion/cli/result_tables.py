"""Tables of the results of commands: rows of text, titles first, none where there is nothing to show."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fusion.cli.console import number, score
from fusion.errors import UserError
from fusion.runs.run import Run
from fusion.runs.sweep import Job
from fusion.store.listing import as_bytes
from fusion.store.lookup import read_folder
from fusion.store.settings_groups import Lookup
from fusion.store.settings_groups import key_of as key_of_settings
from fusion.text import key_of

Row = tuple[str, ...]
DEFAULT = "(default)"  # a job without a key that others set


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
        return trained([(_name(job), _state(job), job.result) for job in jobs])
    if command == "evaluate" and any(job.result for job in jobs):
        return evaluated([(_state(job), job.result or {"name": _name(job)}) for job in jobs])
    return []


def _name(job: Job) -> str:
    return str(job.status.get("name") or job.place.name)


def _state(job: Job) -> str:
    if job.state == "done" and job.status.get("before") == "done":
        return "done already"
    return {"running": "did not end", "none": "no status"}.get(job.state, job.state)


def trained(entries: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[Row]:
    """Results of trainings, from the name, state and result of each."""
    scores = [
        {
            metric if split == "validation" else f"{split}/{metric}": score(value)
            for split, metrics in (result.get("metrics") or {}).items()
            for metric, value in metrics.items()
        }
        for _, _, result in entries
    ]
    keys = dict.fromkeys(key for of_one in scores for key in of_one)
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
    """Evaluations, from the state and result of each: a row for each split that was scored."""
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


def _table(rows: Sequence[dict[str, str]]) -> list[Row]:
    """The rows, without the column of states where there are none."""
    if not any(row["state"] for row in rows):
        rows = [{key: cell for key, cell in row.items() if key != "state"} for row in rows]
    return [tuple(rows[0]), *(tuple(row.values()) for row in rows)]


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


# --- the settings of a sweep ----------------------------------------------------------------------


def settings_table(jobs: Sequence[Job]) -> list[Row]:
    """For each setting of a sweep the mean score over its seeds; none where there are no two jobs to compare.

    The score is the main metric: of the first validation split; of a multi-task run, the mean. The best is marked within
    each task. `sd` is the standard deviation of the sample (n - 1). The column `seeds` is called `runs` where a seed
    was trained twice.
    """
    scores = [_main_score(job.result) for job in jobs]
    if sum(score is not None for score in scores) < 2:
        return []
    words = [_values(job) for job in jobs]
    keys = dict.fromkeys(key for of_job in words for key in of_job)
    swept = [key for key in keys if len({of_job.get(key) for of_job in words}) > 1]
    groups = _groups(jobs, [tuple(of_job.get(key, DEFAULT) for key in swept) for of_job in words])
    if len(groups) == len(jobs) and set(swept) <= {"task"}:  # the table of jobs has the same rows
        return []
    # What differs within a setting, such as the seed in the names of sources, is not part of it.
    swept = [key for key in swept if all(len({words[n].get(key) for n in members}) == 1 for members in groups)]
    found = [[score[1] for n in members if (score := scores[n]) is not None] for members in groups]
    means = [fmean(values) if values else -math.inf for values in found]
    tasks = [next((jobs[n].result["task"] for n in members if "task" in jobs[n].result), "") for members in groups]
    seeds = [[jobs[n].result["seed"] for n in members if "seed" in jobs[n].result] for members in groups]
    counted = "seeds" if all(len(set(of_group)) == len(of_group) for of_group in seeds) else "runs"
    metrics = {score[0] for score in scores if score is not None}
    table = [(*swept, counted, f"{metrics.pop() if len(metrics) == 1 else 'score'} mean", "sd", "")]
    for members, task, values, mean in zip(groups, tasks, found, means, strict=True):
        of_task = [one for one, other in zip(means, tasks, strict=True) if other == task and one > -math.inf]
        table.append(
            (
                *(words[members[0]].get(key, DEFAULT) for key in swept),
                str(len(members)) if len(values) == len(members) else f"{len(values)} of {len(members)}",
                f"{mean:.4f}" if values else "-",
                f"{stdev(values):.4f}" if len(values) > 1 else "-",
                "best" if len(of_task) > 1 and mean == max(of_task) else "",
            )
        )
    return table


def _values(job: Job) -> dict[str, str]:
    """The values of a job's overrides by key, without seed and name."""
    words = [str(word) for word in job.status.get("overrides") or ()]
    return {key: word.partition("=")[2] for word in words if (key := key_of(word)) not in ("seed", "name")}


def _groups(jobs: Sequence[Job], overrides: Sequence[Row]) -> list[list[int]]:
    """Positions of the jobs of each setting, see `fusion.store.settings_groups`; without an artifact by `overrides`."""
    lookup = Lookup()
    resolved: dict[Row, str] = {}
    for job, values in zip(jobs, overrides, strict=True):
        with contextlib.suppress(KeyError, UserError, OSError):  # nothing stored, or gone
            folder = Path(job.result["artifact"])
            resolved[values] = key_of_settings(lookup.of_artifact(read_folder(folder), folder.parent))
    groups: dict[object, list[int]] = {}
    for position, values in enumerate(overrides):
        groups.setdefault(resolved.get(values, values), []).append(position)
    return list(groups.values())


def _main_score(result: Mapping[str, Any]) -> tuple[str, float] | None:
    """The metric that selects the best epoch and its value; for multiple tasks the mean of their main metrics."""
    first: dict[str, tuple[str, Any]] = {}
    for split, metrics in (result.get("metrics") or {}).items():
        if metrics:
            first.setdefault(split.rpartition("/")[0], next(iter(metrics.items())))
    values = [value for _, value in first.values()]
    if not values or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        return None
    name = next(iter(first.values()))[0] if len(first) == 1 else "mean"
    return name, fmean(values)

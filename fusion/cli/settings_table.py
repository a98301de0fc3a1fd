"""The table at the end of a sweep: for each setting, the mean score over its seeds, with the best marked.

Jobs belong to one setting where their artifacts have the same resolved settings, see `fusion.store.settings_groups`, so
that sources which differ by their seed alone are one setting. A job without an artifact belongs to those with its
overrides.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.runs.sweep import Job
from fusion.store.lookup import read_folder
from fusion.store.settings_groups import Lookup
from fusion.store.settings_groups import key_of as key_of_settings
from fusion.text import key_of

DEFAULT = "(default)"  # a job without a key that others set


def settings_table(jobs: Sequence[Job]) -> list[tuple[str, ...]]:
    """Rows, titles first; none where there are no two jobs to compare.

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
    metrics = {score[0] for score in scores if score is not None}
    found = [[score[1] for n in members if (score := scores[n]) is not None] for members in groups]
    tasks = [next((jobs[n].result["task"] for n in members if "task" in jobs[n].result), "") for members in groups]
    means: dict[str, list[float]] = {}
    for task, values in zip(tasks, found, strict=True):
        means.setdefault(task, []).extend([statistics.fmean(values)] if values else [])
    seeds = [[jobs[n].result["seed"] for n in members if "seed" in jobs[n].result] for members in groups]
    counted = "seeds" if all(len(set(of_group)) == len(of_group) for of_group in seeds) else "runs"
    table = [(*swept, counted, f"{metrics.pop() if len(metrics) == 1 else 'score'} mean", "sd", "")]
    for members, task, values in zip(groups, tasks, found, strict=True):
        mean = statistics.fmean(values) if values else None
        best = mean is not None and len(means[task]) > 1 and mean == max(means[task])
        table.append(
            (
                *(words[members[0]].get(key, DEFAULT) for key in swept),
                str(len(members)) if len(values) == len(members) else f"{len(values)} of {len(members)}",
                "-" if mean is None else f"{mean:.4f}",
                f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-",
                "best" if best else "",
            )
        )
    return table


def _values(job: Job) -> dict[str, str]:
    """The values of a job's overrides by key, without seed and name."""
    words = [str(word) for word in job.status.get("overrides") or ()]
    return {key: word.partition("=")[2] for word in words if (key := key_of(word)) not in ("seed", "name")}


def _groups(jobs: Sequence[Job], overrides: Sequence[tuple[str, ...]]) -> list[list[int]]:
    """Positions of the jobs of each setting.

    Args:
        overrides: of each job the values of what is swept, without seed and name.
    """
    lookup = Lookup()
    resolved: dict[tuple[str, ...], str] = {}
    for job, values in zip(jobs, overrides, strict=True):
        with contextlib.suppress(KeyError, UserError, OSError):  # nothing stored, or gone
            folder = Path(job.result["artifact"])
            resolved[values] = key_of_settings(lookup.of_artifact(read_folder(folder), folder.parent))
    groups: dict[object, list[int]] = {}
    for number, values in enumerate(overrides):
        groups.setdefault(resolved.get(values, values), []).append(number)
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
    return name, statistics.fmean(values)

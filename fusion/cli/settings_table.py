"""The table at the end of a sweep: for each setting, the mean score over its seeds, with the best marked.

Jobs belong together where their artifacts have the same resolved settings, see `fusion.store.settings_groups`, so that
sources which differ by their seed alone are one setting. A job without an artifact belongs to those with its overrides.
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

NOT_SETTINGS = ("seed", "name")


def settings_table(jobs: Sequence[Job]) -> list[tuple[str, ...]]:
    """Rows, titles first; none where there are no two jobs to compare.

    The score is the main metric: of the first validation split, of several tasks the mean. The best is marked within
    each task. Where a seed was trained twice, under two names, the column `seeds` is called `runs`. `sd` is the standard deviation of the sample (n - 1), and jobs without a score are counted.
    """
    words = [{key_of(str(word)): str(word) for word in job.status.get("overrides") or ()} for job in jobs]
    scores = [_main_score(job.result) for job in jobs]
    if sum(score is not None for score in scores) < 2:
        return []
    keys = list(dict.fromkeys(key for one in words for key in one))
    swept = [key for key in keys if len({one.get(key) for one in words}) > 1 and key not in NOT_SETTINGS]
    groups = _groups(jobs, [tuple(_value(one.get(key)) for key in swept) for one in words])
    if len(groups) == len(jobs) and set(swept) <= {
        "task"
    }:  # a row for each job is what the table of jobs has
        return []
    # What differs within a setting, such as the seed in the names of sources, is not part of it.
    swept = [key for key in swept if all(len({words[n].get(key) for n in group}) == 1 for group in groups)]
    metrics = list(dict.fromkeys(score[0] for score in scores if score is not None))
    title = metrics[0] if len(metrics) == 1 else "score"
    rows: list[tuple[tuple[str, ...], str, list[float], int]] = []
    for members in groups:
        setting = tuple(_value(words[members[0]].get(key)) for key in swept)
        found = [score[1] for number in members if (score := scores[number]) is not None]
        task = next((str(jobs[n].result["task"]) for n in members if jobs[n].result.get("task")), "")
        rows.append((setting, task, found, len(members)))
    best: dict[str, float] = {}
    for _, task, found, _ in rows:
        if found:
            best[task] = max(best.get(task, -math.inf), statistics.fmean(found))
    several = {task: sum(row[1] == task and bool(row[2]) for row in rows) > 1 for task in best}
    seeds = [[jobs[n].result["seed"] for n in group if "seed" in jobs[n].result] for group in groups]
    counted = "seeds" if all(len(set(of_group)) == len(of_group) for of_group in seeds) else "runs"
    table = [(*swept, counted, f"{title} mean", "sd", "")]
    for setting, task, found, planned in rows:
        mean = statistics.fmean(found) if found else None
        is_best = mean is not None and mean == best[task] and several[task]
        table.append(
            (
                *setting,
                str(planned) if len(found) == planned else f"{len(found)} of {planned}",
                "-" if mean is None else f"{mean:.4f}",
                f"{statistics.stdev(found):.4f}" if len(found) > 1 else "-",
                "best" if is_best else "",
            )
        )
    return table


def _groups(jobs: Sequence[Job], overrides: Sequence[tuple[str, ...]]) -> list[list[int]]:
    """Positions of the jobs of each setting.

    Args:
        overrides: of each job the values of what is swept, without seed and name.
    """
    lookup = Lookup()
    resolved: dict[tuple[str, ...], str] = {}
    for job, said in zip(jobs, overrides, strict=True):
        with contextlib.suppress(KeyError, UserError, OSError):  # nothing stored, or gone
            folder = Path(job.result["artifact"])
            resolved[said] = key_of_settings(lookup.of_artifact(read_folder(folder), folder.parent))
    groups: dict[object, list[int]] = {}
    for number, said in enumerate(overrides):
        groups.setdefault(resolved.get(said, said), []).append(number)
    return list(groups.values())


def _value(word: str | None) -> str:
    """The value of an override; a job without it has the default."""
    return "(default)" if word is None else word.partition("=")[2]


def _main_score(result: Mapping[str, Any]) -> tuple[str, float] | None:
    """Name and value of what picks the best epoch; of several tasks the mean of their main metrics."""
    first: dict[str, tuple[str, Any]] = {}
    for split, metrics in (result.get("metrics") or {}).items():
        task = split.rpartition("/")[0]
        if metrics:
            first.setdefault(task, next(iter(metrics.items())))
    values = [value for _, value in first.values()]
    if not values or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        return None
    name = next(iter(first.values()))[0] if len(first) == 1 else "mean"
    return name, statistics.fmean(values)

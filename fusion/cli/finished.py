"""Output printed when a command finishes: tables of results (titles first, may be empty) and next commands."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fusion.analysis.ranking.selection import all_adapters
from fusion.cli.console import number, say, score, show_table
from fusion.errors import UserError
from fusion.runs.run import Run
from fusion.runs.sweep import Job, main_score
from fusion.store.compatibility import DEBUG
from fusion.store.listing import as_bytes
from fusion.store.lookup import names, read_folder
from fusion.store.settings_groups import Lookup
from fusion.store.settings_groups import key_of as key_of_settings
from fusion.text import is_within, key_of, override, shell_line

Row = tuple[str, ...]
TRAINING = ("stage1", "stage2", "select")
DEFAULT = "(default)"  # a job without a key that other jobs set
NEXT = "FUSION_NEXT"  # environment variable: 0 prints no next commands
# Keys (and all keys below them) whose overrides are passed on to the next command.
FOR_TRAINING = ("store", "data", "backbone", "logger", "trainer.accelerator")
FOR_USING = (
    *("store", "data.dir", "data.cache_dir", "data.limit.validation", "data.batch_size", "data.tokens_per_batch"),
    *("backbone.name_or_path", "backbone.revision", "backbone.trust_remote_code"),
)


def end_of_run(run: Run, result: Mapping[str, Any]) -> None:
    """Print the table of one run and the next commands, if any."""
    table = run_table(run, result)
    _show([table], _next_commands(run, result) if table or run.command == "rank" else [])


def end_of_sweep(command: str, folder: Path, jobs: Sequence[Job]) -> None:
    """Print the table of all jobs of a sweep, the table of its settings, and the next commands."""
    table = results_table(command, [(_name(job), _state(job), job.result) for job in jobs])
    following = []
    if table and command == "stage1":
        words = [[str(word) for word in job.status.get("overrides") or ()] for job in jobs]
        common = [word for word in words[0] if all(word in others for others in words)]
        following += _stage2(common, [job.result for job in jobs if job.result])
    if table:
        following.append(_report(folder))
    _show([table, settings_table(jobs) if command in TRAINING else []], following)


def _show(tables: Sequence[Sequence[Row]], following: Sequence[str]) -> None:
    with contextlib.suppress(OSError):  # stdout is a closed pipe
        for place, table in enumerate(filter(None, tables)):
            if place:
                say()
            show_table(table)
        for place, line in enumerate(following if os.environ.get(NEXT) != "0" else ()):
            say(f"{'  or:' if place else 'next:'} {line}")
        sys.stdout.flush()


def run_table(run: Run, result: Mapping[str, Any]) -> list[Row]:
    if run.command == "inspect":
        return inspected(result)
    if run.command == "select":
        return compared(result["selection"]) if "selection" in result else []
    if run.command == "predict":
        cells = (result.get("name"), result.get("rows"), (result.get("speed") or {}).get("seconds"))
        return [("name", "examples", "seconds", "output"), tuple(map(number, (*cells, result.get("output"))))]
    return results_table(run.command, [(str(result.get("name")), "", result)])


def _name(job: Job) -> str:
    return str(job.status.get("name") or job.place.name)


def _state(job: Job) -> str:
    if job.state == "done" and job.status.get("before") == "done":
        return "already done"
    return {"running": "not finished", "none": "no status"}.get(job.state, job.state)


def results_table(command: str, entries: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[Row]:
    """Return the table of training runs, or of evaluations with one row per split; empty for other commands.

    Args:
        entries: name, state and result of each run. The column of states is omitted if all are empty.
    """
    if command not in (*TRAINING, "evaluate"):
        return []
    rows: list[tuple[dict[str, str], Mapping[str, Any], dict[str, str]]] = []  # cells before the scores, scores, others
    for name, state, result in entries:
        first = {"name": name, **({"state": state} if any(state for _, state, _ in entries) else {})}
        metrics = result.get("metrics") or {"-": {}}
        if command == "evaluate":
            examples = {"examples": number(result.get("rows")) if len(metrics) == 1 else "-"}
            first["name"] = str(result.get("name", name))
            rows += [(first | {"split": split}, values, examples) for split, values in metrics.items()]
            continue
        parameters, speed = result.get("parameters") or {}, result.get("speed") or {}
        stored = parameters.get("stored_bytes")
        first["best epoch"] = number(result.get("best_epoch")) + " (diverged)" * bool(result.get("diverged"))
        scores = {
            metric if split == "validation" else f"{split}/{metric}": value
            for split, values in metrics.items()
            for metric, value in values.items()
        }
        costs = {
            "trained": number(parameters.get("trainable")),
            "stored": "-" if stored is None else as_bytes(stored),
            "seconds": number(speed.get("seconds")),
        }
        rows.append((first, scores, costs))
    keys = dict.fromkeys(key for _, scores, _ in rows for key in scores)
    if not keys:
        return []
    table = [first | {key: score(scores.get(key)) for key in keys} | last for first, scores, last in rows]
    return [tuple(table[0]), *(tuple(row.values()) for row in table)]


def inspected(result: Mapping[str, Any]) -> list[Row]:
    """Return attention and ablation by source. A change is inconclusive if its interval contains 0 or is unknown."""
    metric, full = next(iter(next(iter(result["metrics"].values())).items()))
    table: list[Row] = [("source", "attention", f"{metric} without it", "change", "95% interval")]
    intervals = result.get("intervals")  # missing in version 0.1
    for source, weight in result["attention"].items():
        without = result["masked"].get(source)
        change = "-" if without is None else f"{without - full:+.4f}"
        interval = "-" if without is None or intervals is None else _interval(*intervals[source])
        table.append((source, score(weight), score(without), change, interval))
    return table


def compared(selection: Mapping[str, Any]) -> list[Row]:
    """Return the scores of the methods of a selection, on the examples that selected the method and on others."""
    metric = selection["metric"]
    split = next(iter(selection["methods"][0]["metrics"]))
    held_out = "held-out fold" if split.startswith("validation") else split
    examples = selection["examples"]
    titles = f"{metric} for the selection ({examples['selection']})", f"{metric}, {held_out} ({examples['report']})"
    table: list[Row] = [("method", *titles, "trained", "seconds", "")]
    for one in selection["methods"]:
        scores = score(one["score"]), score(one["metrics"][split][metric])
        selected = "selected" if one["method"] == selection["chosen"] else ""
        table.append((one["method"], *scores, number(one["trainable"]), number(one["seconds"]), selected))
    return table


def _interval(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "none, inconclusive"
    return f"{low:+.4f} to {high:+.4f}{', inconclusive' if low <= 0 <= high else ''}"


def settings_table(jobs: Sequence[Job]) -> list[Row]:
    """Return the mean main score over seeds for each setting of a sweep; empty for fewer than two jobs.

    The best setting is marked per task. `sd` is the sample standard deviation (n - 1). The column `seeds` is named
    `runs` if a seed was used more than once.
    """
    scores = [main_score(job.result) for job in jobs]
    if sum(score is not None for score in scores) < 2:
        return []
    words = [_values(job) for job in jobs]
    keys = dict.fromkeys(key for of_job in words for key in of_job)
    swept = [key for key in keys if len({of_job.get(key) for of_job in words}) > 1]
    groups = _groups(jobs, [tuple(of_job.get(key, DEFAULT) for key in swept) for of_job in words])
    if len(groups) == len(jobs) and set(swept) <= {"task"}:  # same rows as the table of jobs
        return []
    # Keys that differ within a setting, such as sources named by seed, are not part of it.
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
    """Return the values of a job's overrides by key, without seed and name."""
    words = [str(word) for word in job.status.get("overrides") or ()]
    return {key: word.partition("=")[2] for word in words if (key := key_of(word)) not in ("seed", "name")}


def _groups(jobs: Sequence[Job], overrides: Sequence[Row]) -> list[list[int]]:
    """Return the indices of the jobs of each setting; jobs without an artifact are grouped by `overrides`."""
    lookup = Lookup()
    resolved: dict[Row, str] = {}
    for job, values in zip(jobs, overrides, strict=True):
        with contextlib.suppress(KeyError, UserError, OSError):  # no artifact
            folder = Path(job.result["artifact"])
            resolved[values] = key_of_settings(lookup.of_artifact(read_folder(folder), folder.parent))
    groups: dict[object, list[int]] = {}
    for index, values in enumerate(overrides):
        groups.setdefault(resolved.get(values, values), []).append(index)
    return list(groups.values())


def _next_commands(run: Run, result: Mapping[str, Any]) -> list[str]:
    using, name = _kept(run.overrides, FOR_USING), result.get("name")
    if run.command in TRAINING:
        if "artifact" not in result or not isinstance(name, str) or name.endswith(DEBUG):
            return []  # no artifact to use
        if run.command == "select":  # the other validation examples were used for the selection
            split = "split=test" if "test" in result["metrics"] else "data.validation_fold=2/3"
            using = [word for word in using if not key_of(word).startswith("data.limit.validation")] + [split]
        evaluate = shell_line("evaluate", [override("artifact", name), *using])
        if run.command == "stage1":
            return [evaluate, *_stage2(run.overrides, [result])]
        if result.get("stage") == 1:  # selected by fusion.select
            return [evaluate, _report(run.directory)]
        return [evaluate, shell_line("inspect", [override("artifact", name), *using]), _report(run.directory)]
    if run.command == "predict":
        return [shell_line("evaluate", [override("artifact", run.config.get("artifact")), *using])]
    if run.command == "rank":
        if "sources" not in result:
            return []
        task, top = result["task"]["name"], f"sources=top:{min(3, len(result['sources']))}"
        free = _free_name(task, Path(str(run.config.get("store"))))
        kept = _kept(run.overrides, FOR_TRAINING)
        return [shell_line("stage2", ["+" + override("task", task), top, *free, *kept])]
    return [_report(run.directory)]


def _stage2(words: Sequence[str], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a stage-2 command for the last adapter's task if the store has adapters of other tasks."""
    targets = []
    for result in results:
        with contextlib.suppress(UserError):  # no artifact
            targets.append(read_folder(Path(str(result.get("artifact")))))
    targets = [found for found in targets if found.kind == "adapter" and found.multitask is None]
    if not targets:
        return []
    target, store = targets[-1], Path(str(results[-1]["artifact"])).parent
    try:
        sources = all_adapters(store, target.backbone.name_or_path).sources
    except UserError:
        return []
    # One adapter per task: the last seed, or the newly trained one.
    by_task = {source.task.name: source.name for source in sources if source.multitask is None}
    by_task |= {found.task.name: found.name for found in targets}
    if len(by_task) < 2 or not {*by_task.values()} <= {source.name for source in sources}:
        return []
    kept = _kept(words, FOR_TRAINING)
    keys = {key_of(word) for word in words}
    if "experiment" in keys and not {"backbone", "backbone.name_or_path"} & keys:  # the experiment set the backbone
        kept.append(override("backbone.name_or_path", target.backbone.name_or_path))
        if target.head.pooling != "words":  # set by the task
            kept.append(f"backbone.pooling={target.head.pooling}")
    own = ["+" + override("task", target.task.name), override("sources", list(by_task.values()))]
    return [shell_line("stage2", [*own, *_free_name(target.task.name, store), *kept])]


def _free_name(task: str, store: Path) -> list[str]:
    """Return a name= override for a fusion of the task if the default name is taken."""
    first, there = f"{task}-adapterfusion", set(names(store))
    if first not in there:
        return []
    number = next(n for n in range(2, len(there) + 3) if f"{first}-{n}" not in there)
    return [override("name", f"{first}-{number}")]


def _kept(words: Sequence[str], keys: Sequence[str]) -> list[str]:
    return [word for word in words if is_within(key_of(word), keys)]


def _report(folder: Path) -> str:
    """Return the command for a report on all runs in the top-level output directory."""
    with contextlib.suppress(ValueError, IndexError):
        folder = Path(folder.absolute().relative_to(Path.cwd()).parts[0])
    return shell_line("report", [override("runs", folder)])

"""What is printed when a command has ended, from results and status files: tables, and commands that may come next."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.analysis.ranking.selection import all_adapters
from fusion.cli.console import say, show_table
from fusion.cli.result_tables import Row, run_table, settings_table, sweep_table
from fusion.errors import UserError
from fusion.runs.run import Run
from fusion.runs.sweep import Job
from fusion.store.lookup import names, read_folder
from fusion.text import is_within, key_of, override, shell_line

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

NEXT = "FUSION_NEXT"  # environment: 0 prints no next commands
# Keys whose overrides the next command needs too, with all keys below them.
FOR_TRAINING = ("store", "data", "backbone", "logger", "trainer.accelerator")
FOR_USING = (
    *("store", "data.dir", "data.cache_dir", "data.limit.validation", "data.batch_size", "data.tokens_per_batch"),
    *("backbone.name_or_path", "backbone.revision", "backbone.trust_remote_code"),
)


def end_of_run(run: Run, result: Mapping[str, Any]) -> None:
    """Print the table of one run and the next commands; nothing for a command that has neither."""
    table = run_table(run, result)
    _show([table], _after(run, result) if table or run.command == "rank" else [])


def end_of_sweep(command: str, folder: Path, jobs: Sequence[Job]) -> None:
    """Print a table of all jobs of a sweep, one of its settings, and the next commands."""
    table = sweep_table(command, jobs)
    following = []
    if table and command == "stage1":
        words = [[str(word) for word in job.status.get("overrides") or ()] for job in jobs]
        common = [word for word in words[0] if all(word in others for others in words)]
        following += _stage2(common, [job.result for job in jobs if job.result])
    if table:
        following.append(_report(folder))
    _show([table, settings_table(jobs) if command in ("stage1", "stage2") else []], following)


def _show(tables: Sequence[Sequence[Row]], following: Sequence[str]) -> None:
    with contextlib.suppress(OSError):  # the reader closed the pipe
        for place, table in enumerate(filter(None, tables)):
            if place:
                say()
            show_table(table)
        for place, line in enumerate(following if os.environ.get(NEXT) != "0" else ()):
            say(f"{'  or:' if place else 'next:'} {line}")
        sys.stdout.flush()


# --- next commands --------------------------------------------------------------------------------


def _after(run: Run, result: Mapping[str, Any]) -> list[str]:
    using, name = _kept(run.overrides, FOR_USING), result.get("name")
    if run.command in ("stage1", "stage2"):
        if "artifact" not in result or not isinstance(name, str):
            return []  # nothing was stored
        evaluate = shell_line("evaluate", [override("artifact", name), *using])
        if run.command == "stage1":
            return [evaluate, *_stage2(run.overrides, [result])]
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
    """Stage 2 on the task of the last adapter, where its store has adapters of other tasks."""
    targets = [found for result in results if (found := _adapter(result)) is not None]
    if not targets:
        return []
    target, store = targets[-1], Path(str(results[-1]["artifact"])).parent
    try:
        sources = all_adapters(store, target.backbone.name_or_path).sources
    except UserError:
        return []
    # One adapter per task: the last seed, or the one that was just trained.
    by_task = {source.task.name: source.name for source in sources if source.multitask is None}
    by_task |= {found.task.name: found.name for found in targets}
    if len(by_task) < 2 or not {*by_task.values()} <= {source.name for source in sources}:
        return []
    kept = _kept(words, FOR_TRAINING)
    keys = {key_of(word) for word in words}
    if "experiment" in keys and not {"backbone", "backbone.name_or_path"} & keys:  # it chose the backbone
        kept.append(override("backbone.name_or_path", target.backbone.name_or_path))
        if target.head.pooling != "words":  # a property of the task, not of the backbone
            kept.append(f"backbone.pooling={target.head.pooling}")
    own = ["+" + override("task", target.task.name), override("sources", list(by_task.values()))]
    return [shell_line("stage2", [*own, *_free_name(target.task.name, store), *kept])]


def _adapter(result: Mapping[str, Any]) -> Manifest | None:
    """The manifest of what was stored, if it is an adapter of one task."""
    try:
        manifest = read_folder(Path(str(result.get("artifact"))))
    except UserError:
        return None
    return manifest if manifest.kind == "adapter" and manifest.multitask is None else None


def _free_name(task: str, store: Path) -> list[str]:
    """name= for a fusion of the task where the store has one of the default name."""
    first, there = f"{task}-adapterfusion", set(names(store))
    if first not in there:
        return []
    number = next(n for n in range(2, len(there) + 3) if f"{first}-{n}" not in there)
    return [override("name", f"{first}-{number}")]


def _kept(words: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The overrides of these keys, as they were typed."""
    return [word for word in words if is_within(key_of(word), keys)]


def _report(folder: Path) -> str:
    """A report on all runs beside this one: below the first folder on the way to it, which is `outputs`."""
    with contextlib.suppress(ValueError, IndexError):
        folder = Path(folder.absolute().relative_to(Path.cwd()).parts[0])
    return shell_line("report", [override("runs", folder)])

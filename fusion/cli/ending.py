"""What a command says when it has ended: a small table of what came of it, and what can be typed next.

Everything is read off results and statuses as they lie in the run's folder, so that a run that was done already, a
job in another process and a sweep say the same.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.cli.console import say, show_table
from fusion.cli.settings_table import settings_table
from fusion.errors import UserError
from fusion.runs.run import Run
from fusion.runs.sweep import Job
from fusion.store.listing import as_bytes
from fusion.store.lookup import names, read_folder
from fusion.store.overview import everything
from fusion.store.settings_groups import Lookup, group
from fusion.store.trained_data import data_folder_of, split_of
from fusion.store.unfit import why_unfit
from fusion.text import key_of, override, shell_line

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

NEXT = "FUSION_NEXT"  # environment: 0 leaves out what can be typed next
STAGES = ("stage1", "stage2")
# What a user has said that the next command needs too, by the beginning of the key.
FOR_TRAINING = ("store", "data", "backbone", "logger", "trainer.accelerator")
FOR_USING = (
    "store",
    "data.dir",
    "data.cache_dir",
    "data.limit.validation",
    "data.batch_size",
    "data.tokens_per_batch",
    "backbone.name_or_path",
    "backbone.revision",
    "backbone.trust_remote_code",
)
MOST_SOURCES = 8
MOST_COLUMNS = 4  # of scores


def end_of_run(run: Run, result: Mapping[str, Any]) -> None:
    """The table of one run, and the next commands; nothing for a command that has neither."""
    rows, following = [], []
    if run.command in STAGES:
        rows = trained([(str(result.get("name")), "", result)])
        if rows:
            following = _after_training(run.command, run.overrides, run.config, result, run.directory)
    elif run.command == "evaluate":
        rows = evaluated([("", result)])
        following = [_report(run.directory)] if rows else []
    elif run.command == "predict":
        speed = result.get("speed") or {}
        row = (result.get("name"), result.get("rows"), speed.get("seconds"), result.get("output"))
        rows = [("name", "rows", "seconds", "output"), tuple(map(number, row))]
        used = [override("artifact", run.config.get("artifact")), *_data_of(result)]
        following = [_line("evaluate", used, _said(run.overrides, FOR_USING))]
    elif run.command == "rank" and "sources" in result:  # which has shown its own tables
        own = [
            "+" + override("task", result["task"]["name"]),
            f"sources=top:{min(3, len(result['sources']))}",
        ]
        own += _free_name(result["task"]["name"], Path(str(run.config.get("store"))))
        following = [_line("stage2", own, _said(run.overrides, FOR_TRAINING))]
    elif run.command == "inspect":
        rows = inspected(result)
        following = [_report(run.directory)]
    _show(rows, following)


def end_of_sweep(command: str, folder: Path, jobs: Sequence[Job]) -> None:
    """One table of all jobs of a sweep, and the next commands."""
    done = [job.result for job in jobs if job.result]
    rows: list[tuple[str, ...]] = []
    compared: list[tuple[str, ...]] = []
    if command in STAGES:
        entries = [(_name(job), _state(job), job.result) for job in jobs]
        rows = trained(entries) if any("metrics" in result for result in done) else []
        compared = settings_table(jobs)
    elif command == "evaluate":
        rows = evaluated([(_state(job), job.result or {"name": _name(job)}) for job in jobs])
    following = []
    if rows and command == "stage1":
        words = [[str(word) for word in job.status.get("overrides") or ()] for job in jobs]
        common = [word for word in words[0] if all(word in others for others in words)]
        following += _fuse(common, {}, done)
    if rows and done:
        following.append(_report(folder))
    _show(rows, following, compared)


# --- tables ---------------------------------------------------------------------------------------


def trained(entries: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """Rows of a table of training results, titles first; without the state where none is said.

    Args:
        entries: name, state and result of each.
    """
    if not any("metrics" in result for _, _, result in entries):
        return []
    states = any(state for _, state, _ in entries)
    titles, scores = _scores([result for _, _, result in entries])
    table = [("name", *(["state"] if states else []), "best epoch", *titles, "trained", "stored", "seconds")]
    for (name, state, result), values in zip(entries, scores, strict=True):
        parameters, speed = result.get("parameters") or {}, result.get("speed") or {}
        stored = parameters.get("stored_bytes")
        table.append(
            (
                name,
                *([state] if states else []),
                number(result.get("best_epoch")) + (" (diverged)" if result.get("diverged") else ""),
                *values,
                number(parameters.get("trainable")),
                "-" if stored is None else as_bytes(stored),
                number(speed.get("seconds")),
            )
        )
    return table


def evaluated(entries: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """Rows of a table of evaluations, titles first: a line for each split that was scored."""
    lines = []
    for state, result in entries:
        for split, metrics in (result.get("metrics") or {"-": {}}).items():
            lines.append((state, str(result.get("name")), split, result, metrics))
    keys = list(dict.fromkeys(key for *_, metrics in lines for key in metrics))
    if not keys:
        return []
    states = any(state for state, *_ in lines)
    table = [("name", *(["state"] if states else []), "split", *keys, "rows")]
    for state, name, split, result, metrics in lines:
        shown = [score(metrics.get(key)) for key in keys]
        rows = number(result.get("rows")) if len(result.get("metrics") or ()) == 1 else "-"
        table.append((name, *([state] if states else []), split, *shown, rows))
    return table


def inspected(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Of each source its share of the attention, and the first metric without it, with the interval of the change.

    A change is inconclusive where its 95 % bootstrap interval over the rows contains zero, or there is none.
    """
    metric, full = next(iter(next(iter(result["metrics"].values())).items()))
    table: list[tuple[str, ...]] = [("source", "attention", f"{metric} without it", "change", "95% interval")]
    intervals = result.get("intervals")  # which 0.1 did not keep
    for source, share in result["attention"].items():
        without = result["masked"].get(source)
        change = "-" if without is None else f"{without - full:+.4f}"
        interval = "-" if without is None or intervals is None else _interval(*intervals[source])
        table.append((source, score(share), score(without), change, interval))
    return table


def _interval(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "none, inconclusive"
    return f"{low:+.4f} to {high:+.4f}{', inconclusive' if low <= 0 <= high else ''}"


def _scores(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the scores: a column for each where they are few, else one for all."""
    flat = [
        {
            (metric if split == "validation" else f"{split}/{metric}"): value
            for split, metrics in (result.get("metrics") or {}).items()
            for metric, value in metrics.items()
        }
        for result in results
    ]
    keys = list(dict.fromkeys(key for scores in flat for key in scores))
    if len(keys) <= MOST_COLUMNS:
        return keys, [[score(scores.get(key)) for key in keys] for scores in flat]
    said = [", ".join(f"{key} {score(value)}" for key, value in scores.items()) or "-" for scores in flat]
    return ["scores"], [[text] for text in said]


def score(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "-"


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)


def _name(job: Job) -> str:
    return str(job.status.get("name") or job.place.name)


def _state(job: Job) -> str:
    status = str(job.status.get("status") or "no status")
    if status == "done" and job.status.get("before") == "done":
        return "done already"
    return "did not end" if status == "running" else status


# --- what can be typed next -----------------------------------------------------------------------


def _after_training(
    command: str, words: Sequence[str], config: Mapping[str, Any], result: Mapping[str, Any], folder: Path
) -> list[str]:
    name = result.get("name")
    if "artifact" not in result or not isinstance(name, str):
        return []  # nothing was stored
    used = [override("artifact", name)]
    lines = [_line("evaluate", used, _said(words, FOR_USING))]
    if command == "stage1":
        return lines + _fuse(words, config, [result])
    return [*lines, _line("inspect", used, _said(words, FOR_USING)), _report(folder)]


def _fuse(words: Sequence[str], config: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Stage 2 on the last one's task: of one result with what else the store has for it, of several with these."""
    adapters = [found for result in results if (found := _adapter(result)) is not None]
    if not adapters or why_unfit(adapters[-1]) is not None:
        return []
    target = adapters[-1]
    store = Path(str(results[-1]["artifact"])).parent
    if len(results) == 1:
        others = [
            found.manifest
            for found in everything(store)
            if found.manifest is not None and not found.replaced and found.place == found.manifest.name
        ]
        adapters = [other for other in others if _fits(other, target) and other.name != target.name]
        adapters = [*_one_seed_each(adapters, target, store)[:-1][: MOST_SOURCES - 1], target]
    else:
        adapters = [adapter for adapter in adapters if _fits(adapter, target)]
        adapters = _one_seed_each(adapters[:-1], target, store)
    tasks = [adapter.task.name for adapter in adapters]
    if len(set(tasks)) < 2:  # there is nothing to choose from
        return []
    said = _said(words, FOR_TRAINING)
    keys = [key_of(word) for word in said]
    by_experiment = any(key_of(word) == "experiment" for word in words)
    if by_experiment and not {"backbone", "backbone.name_or_path"} & set(keys):
        said.append(override("backbone.name_or_path", target.backbone.name_or_path))
        if target.head.pooling != "words":  # which is of the task, not of the backbone
            said.append(f"backbone.pooling={target.head.pooling}")
    sources = override("sources", [adapter.name for adapter in adapters])
    own = ["+" + override("task", target.task.name), sources, *_free_name(target.task.name, store)]
    return [_line("stage2", own, said)]


def _free_name(task: str, store: Path) -> list[str]:
    """A name for a fusion of the task where the one that it would get is taken; nothing where it is free."""
    first, there = f"{task}-adapterfusion", set(names(store))
    if first not in there:
        return []
    number = next(n for n in range(2, len(there) + 3) if f"{first}-{n}" not in there)
    return [override("name", f"{first}-{number}")]


def _data_of(result: Mapping[str, Any]) -> list[str]:
    """The folder that an artifact's rows were read from, which another command on its own rows needs."""
    try:
        folder = data_folder_of(read_folder(Path(str(result.get("artifact")))))
    except UserError:
        return []
    return [] if folder is None else [override("data.dir", folder)]


def _adapter(result: Mapping[str, Any]) -> Manifest | None:
    """The manifest of what was stored, if a fusion can take it in."""
    try:
        manifest = read_folder(Path(str(result.get("artifact"))))
    except UserError:
        return None
    return manifest if manifest.kind == "adapter" and manifest.multitask is None else None


def _fits(one: Manifest, other: Manifest) -> bool:
    """Whether two can be sources of one fusion."""
    return (
        one.kind == "adapter"
        and one.multitask is None
        and why_unfit(one) is None
        and one.backbone.fingerprint == other.backbone.fingerprint
        and (None in (known := (one.backbone.tokenizer, other.backbone.tokenizer)) or known[0] == known[1])
        and one.placement == other.placement
        and not _saw_other_rows(one, other)
    )


def _saw_other_rows(one: Manifest, target: Manifest) -> bool:
    """Whether it was trained on rows of the target's task that a split made of the training rows may hold."""
    fingerprints = [manifest.data.fingerprints.get("train") for manifest in (one, target)]
    made = bool(split_of(target).overrides())
    return made and one.task.name == target.task.name and fingerprints[0] != fingerprints[1]


def _one_seed_each(others: Sequence[Manifest], target: Manifest, store: Path) -> list[Manifest]:
    """Of artifacts that differ by their seed alone one, with the target's seed where there is one; the target is last."""
    every, lookup = [*others, target], Lookup()
    chosen = []
    for positions in group(lookup.of_artifact(manifest, store) for manifest in every):
        if len(every) - 1 not in positions:  # the others of the target's group are the target again
            members = [every[position] for position in positions]
            chosen.append(next((one for one in members if one.seed == target.seed), members[0]))
    return [*chosen, target]


def _said(words: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The overrides of a command that the next one needs again, as they were typed."""
    return [
        word
        for word in words
        if any(key_of(word) == key or key_of(word).startswith(f"{key}.") for key in keys)
    ]


def _report(folder: Path) -> str:
    """On all that lies beside the run: below the first folder on the way to it from here, which is `outputs`."""
    with contextlib.suppress(ValueError, IndexError):
        folder = Path(folder.absolute().relative_to(Path.cwd()).parts[0])
    return _line("report", [override("runs", folder)], [])


def _line(command: str, own: Sequence[str], said: Sequence[str]) -> str:
    """One line for a shell."""
    return shell_line(command, [*own, *said])


def _show(
    rows: Sequence[tuple[str, ...]], following: Sequence[str], more: Sequence[tuple[str, ...]] = ()
) -> None:
    with contextlib.suppress(OSError):  # a pipe that nobody reads any more
        if rows:
            show_table(rows)
        if more:
            say("", sys.stdout)
            show_table(more)
        for text in _titled(following) if os.environ.get(NEXT) != "0" else ():
            say(text, sys.stdout)
        sys.stdout.flush()


def _titled(following: Sequence[str]) -> Iterator[str]:
    """A command keeps a line to itself, however long it is: so it can be copied whole."""
    for place, line in enumerate(following):
        yield f"{'next:' if place == 0 else '  or:'} {line}"

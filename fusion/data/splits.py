"""Where a task's splits are: files of a local folder, parts of a corpus, or splits on the hub.

The hub has its own names of splits; `hub.splits` of a task file maps train, validation and test to them: a name, a
list of names, or a part of a split such as `train[90%:]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fusion.config.data import DataConfig
from fusion.config.task import TaskConfig
from fusion.data.draws import Holdout
from fusion.data.files import READABLE, SplitFiles, contents, split_files
from fusion.errors import UserError
from fusion.files import check_relative, resolve_path
from fusion.tasks.table import kind_of
from fusion.text import did_you_mean, listed

SPLITS = ("train", "validation", "test")
HELD_OUT = ("validation", "test")  # those that `data.split` can take from the training rows

_PART = re.compile(r"(?P<name>[^\[\]]+)\[(?P<start>\d{0,2})%?:(?P<stop>\d{0,2})%?\]")


class Part(NamedTuple):
    """The name of a split, and a range of its rows in percent."""

    name: str
    start: int = 0
    stop: int = 100

    @property
    def is_whole(self) -> bool:
        return (self.start, self.stop) == (0, 100)


def evaluation_splits(task: TaskConfig, split: str, data: DataConfig | None = None) -> list[str]:
    """The hub's names of `split`, of which a local folder may lack some; MNLI has two validation splits.

    Args:
        split: train, validation, test, or the hub's own name of a split.

    Raises:
        UserError: the task does not have the split.
    """
    data = DataConfig() if data is None else data
    published = _published(task, split)
    if holdout(task, data, split) is not None:
        return [split]
    if _is_local(task, data):
        files = _files(task, data)
        named = [split] if split in files else [name for name in published if name in files]
        if not named:
            locate(task, data, split)
        return named or [split]
    if task.hub is None or task.corpus is not None:
        known, published = list(SPLITS), [split] if split in SPLITS else []
    else:
        known = [*task.hub.splits, *(name for ours in task.hub.splits for name in _published(task, ours))]
    if not published:
        names = ", ".join(dict.fromkeys(known))
        raise UserError(f"task {task.name} has no split {split}: expected one of {names}\n{_hint(split)}".strip())
    return published


def locate(task: TaskConfig, data: DataConfig, split: str) -> tuple[SplitFiles | None, Part]:
    """The local files of a split (None: on the hub, or of the corpus), and the part of its rows.

    Raises:
        UserError: the folder, the split or a shard is missing; lists what exists.
    """
    if not _is_local(task, data):
        names = evaluation_splits(task, split)
        if task.corpus is not None:
            return None, Part(split)
        if task.hub is None:
            raise UserError(
                f"task {task.name} has neither hub nor corpus, so its rows must be local\n"
                f"data.dir=DIR reads DIR/{task.name}/{split}.parquet (jsonl, json, csv, tsv)"
            )
        if len(names) > 1:
            raise UserError(f"task {task.name}: {split} is {' and '.join(names)} on the hub; select one of them")
        name = task.hub.splits.get(split, split)
        return None, _part(task, name[0] if isinstance(name, list) else name)
    files = _files(task, data)
    found = _find(task, files, split)
    if found is not None:
        found[0].check_complete()
        return found
    folder = _folder(task, data)
    similar = "" if split in SPLITS else did_you_mean(split, [*SPLITS, *files])
    hints = "".join(f"; {hint}" for hint in (_hint(split), _without_local(task)) if hint)
    raise UserError(
        f"{folder} has no {split}: it holds {listed(contents(folder))}{similar.replace(':', ';')}\nExpected {split} "
        f"with an extension {READABLE}, shards {split}-00000-of-00002.parquet, or a folder of save_to_disk{hints}"
    )


def holdout(task: TaskConfig, data: DataConfig, split: str) -> Holdout | None:
    """How `data.split` takes a split from the training rows; None: the split is read as it is.

    `data.split` does not apply to a split that the task has.
    """
    ours = family(task, split)
    fractions = {
        name: fraction
        for name in HELD_OUT
        if (fraction := getattr(data.split, name)) is not None and ours is not None and not _has_split(task, data, name)
    }
    if ours is None or not fractions or (ours != "train" and ours not in fractions):
        return None
    return Holdout(ours, fractions, data.split.seed, data.split.stratify)


def drawn_from_train(task: TaskConfig, data: DataConfig, split: str) -> bool:
    """Whether a split is a share of the rows from which the training rows are drawn, too.

    Raises:
        UserError: the task does not have the split.
    """
    held_out = holdout(task, data, split)
    if held_out is not None or (family(task, split) or "train") == "train":
        return held_out is not None and held_out.split != "train"
    return not locate(task, data, split)[1].is_whole


def check_held_out_splits(tasks: Iterable[TaskConfig], data: DataConfig) -> None:
    """Check that `data.split` applies to a task of a run.

    Raises:
        UserError: all tasks have the split themselves, or one without it has no classes to stratify by.
    """
    every = list(tasks)
    for split in HELD_OUT:
        if (fraction := getattr(data.split, split)) is None:
            continue
        without = [task for task in every if not _has_split(task, data, split)]
        if not without:
            names = ", ".join(str(task.name) for task in every)
            raise UserError(f"data.split.{split}={fraction:g}: {names} already has a {split} split; leave it out")
        if data.split.stratify and (wrong := [task for task in without if not kind_of(task).has_classes]):
            raise UserError(
                f"data.split.stratify=true: {wrong[0].name} is of kind {wrong[0].kind} and has no classes to stratify "
                "by; expected data.split.stratify=false"
            )


def check_source(task: TaskConfig, data: DataConfig, splits: Iterable[str] = ("train", "validation")) -> None:
    """Check, without reading any row, that the task or its local folder has the splits.

    Raises:
        UserError: a split is missing; lists those that exist.
    """
    for split in splits:
        held_out = holdout(task, data, split)
        if held_out is not None and held_out.split != "train":
            split = "train"
        for name in evaluation_splits(task, split, data):
            locate(task, data, name)


def family(task: TaskConfig, split: str) -> str | None:
    """Which of train, validation and test a split is; None: none of them."""
    if split in SPLITS:
        return split
    return next((ours for ours in SPLITS if split in _published(task, ours)), None)


def _is_local(task: TaskConfig, data: DataConfig) -> bool:
    """Whether the task is read from `data.dir`, which must have any task but a corpus."""
    if data.dir is None:
        return False
    if not resolve_path(data.dir, "data.dir").is_dir():
        raise UserError(f"data.dir={data.dir}: no such folder; data.dir=null reads the hub, or the task's corpus")
    return task.corpus is None or _folder(task, data).is_dir()


def _hint(split: str) -> str:
    take = f"data.split.{split}=0.1 takes a tenth of the training rows for it"
    return f"for training, {take}" if split in HELD_OUT else ""


def _without_local(task: TaskConfig) -> str:
    return "" if task.hub is None else "without data.dir, the hub is read"


def _has_split(task: TaskConfig, data: DataConfig, split: str) -> bool:
    """Whether a task has a split without `data.split`."""
    if _is_local(task, data):
        files = _files(task, data)
        return any(name in files for name in _published(task, split)) or bool(_find(task, files, split))
    return split in SPLITS if task.corpus is not None else bool(_published(task, split))


def _find(task: TaskConfig, files: dict[str, SplitFiles], split: str) -> tuple[SplitFiles, Part] | None:
    splits = task.hub.splits if task.hub is not None else {}
    named = {ours: _part(task, name) for ours, name in splits.items() if isinstance(name, str)}
    parts = {ours: part for ours, part in named.items() if not part.is_whole}
    part = parts.get(split, Part(split))
    if split in files:
        # If train.parquet holds train and validation, as on the hub, each is its part; separate files are whole.
        is_shared = any(ours not in files and other.name == split for ours, other in parts.items())
        return files[split], part if part.name == split and is_shared else Part(split)
    published, ours = _published(task, split), family(task, split)
    if len(published) == 1 and published[0] in files:
        return files[published[0]], Part(published[0])
    if ours in files and _published(task, ours)[0] == split:
        return files[ours], Part(ours)
    return (files[part.name], part) if part.name in files else None


def _published(task: TaskConfig, split: str) -> list[str]:
    """The hub's names of a split; our own if the hub's is a part, or one of ours with another meaning."""
    if task.hub is None:
        return []
    splits = task.hub.splits
    if split not in splits:
        return [split] if any(split in _published(task, ours) for ours in splits) else []
    names = splits[split] if isinstance(splits[split], list) else [splits[split]]
    return list(dict.fromkeys(split if "[" in name or name in SPLITS else name for name in names))


def _part(task: TaskConfig, name: str) -> Part:
    if "[" not in name:
        return Part(name)
    found = _PART.fullmatch(name)
    part = Part(found["name"], int(found["start"] or 0), int(found["stop"] or 100)) if found else None
    if part is None or part.start >= part.stop:
        raise UserError(f"task {task.name}: hub.splits has {name}; expected a name, or a part such as train[:90%]")
    return part


def _folder(task: TaskConfig, data: DataConfig) -> Path:
    assert data.dir is not None
    if (reason := check_relative(str(task.name))) is not None:
        raise UserError(f"task {listed([str(task.name)])} is no folder of data.dir: {reason}")
    return resolve_path(data.dir, "data.dir") / str(task.name)


def _files(task: TaskConfig, data: DataConfig) -> dict[str, SplitFiles]:
    """The files in the task's folder, by split."""
    folder = _folder(task, data)
    if not folder.is_dir():
        folders = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
        raise UserError(
            f"data.dir={data.dir} has no folder {task.name}: it holds {listed(folders)}\n"
            f"Expected {folder}/<split>.parquet (jsonl, json, csv, tsv); {_without_local(task)}".removesuffix("; ")
        )
    return split_files(folder)

"""Where a task's splits are: files of a local folder, parts of a corpus, or splits on the hub.

The hub has its own names of splits; `hub.splits` of a task file maps train, validation and test to them: a name, a
list of names, or a part of a split such as `train[90%:]`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fusion.config.data import DataConfig
from fusion.config.task import TaskConfig
from fusion.data.draws import Holdout
from fusion.data.files import READABLE, SplitFiles, contents, split_files
from fusion.errors import UserError
from fusion.files import check_relative, resolve_path
from fusion.tasks.table import kind_of
from fusion.text import listed

SPLITS = ("train", "validation", "test")
HELD_OUT = ("validation", "test")  # those that `data.split` can take from the training rows

_PART = re.compile(r"(?P<name>[^\[\]]+)\[(?P<start>\d{0,2})%?:(?P<stop>\d{0,2})%?\]")


@dataclass(frozen=True)
class Part:
    """The name of a split, and a range of its rows in percent."""

    name: str
    start: int = 0
    stop: int = 100

    @property
    def is_whole(self) -> bool:
        return (self.start, self.stop) == (0, 100)


def evaluation_splits(task: TaskConfig, split: str, data: DataConfig | None = None) -> list[str]:
    """The hub's names of `split`; MNLI has two validation splits.

    Args:
        split: train, validation, test, or the hub's own name of a split.
        data: where the rows are; a local folder may have one file for two splits of the hub.

    Raises:
        UserError: the task has no such split.
    """
    published = _published(task, split)
    if data is not None and holdout(task, data, split) is not None:
        return [split]
    if data is not None and is_local(task, data):
        files = _files(task, data)
        named = [split] if split in files else [name for name in published if name in files]
        if not named:
            local_part(task, data, split)
        return named or [split]
    if task.hub is None or task.corpus is not None:
        known, published = list(SPLITS), [split] if split in SPLITS else []
    else:
        known = [*task.hub.splits, *(name for ours in task.hub.splits for name in _published(task, ours))]
    if not published:
        raise UserError(
            f"task {task.name} has no split {split}: expected one of {', '.join(dict.fromkeys(known))}{_hint(split)}"
        )
    return published


def holdout(task: TaskConfig, data: DataConfig, split: str) -> Holdout | None:
    """How `data.split` takes a split from the training rows; None: the split is read as it is.

    `data.split` does not apply to a split that the task has.
    """
    ours = family(task, split)
    fractions = {name: fraction for name in HELD_OUT if (fraction := getattr(data.split, name)) is not None}
    if ours is None or not fractions:
        return None
    fractions = {name: share for name, share in fractions.items() if not _has_split(task, data, name)}
    if not fractions or (ours != "train" and ours not in fractions):
        return None
    return Holdout(ours, fractions, data.split.seed, data.split.stratify)


def drawn_from_train(task: TaskConfig, data: DataConfig, split: str) -> bool:
    """Whether a split is a share of the rows from which the training rows are drawn, too.

    Raises:
        UserError: the task has no such split.
    """
    held_out = holdout(task, data, split)
    if held_out is not None or (family(task, split) or "train") == "train":
        return held_out is not None and held_out.split != "train"
    if is_local(task, data):
        return not local_part(task, data, split)[1].is_whole
    return task.corpus is None and task.hub is not None and not hub_part(task, split).is_whole


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
            raise UserError(
                f"data.split.{split}={fraction:g}: {names} already has a {split} split; leave it out"
            )
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
        if is_local(task, data):
            for name in evaluation_splits(task, split, data):
                local_part(task, data, name)
        elif task.hub is None and task.corpus is None:
            raise no_source(task, split)
        else:
            evaluation_splits(task, split)


def family(task: TaskConfig, split: str) -> str | None:
    """Which of train, validation and test a split is; None: none of them."""
    if split in SPLITS:
        return split
    return next((ours for ours in SPLITS if split in _published(task, ours)), None)


def hub_part(task: TaskConfig, split: str) -> Part:
    """The hub's split, or part of one, for `split`.

    Raises:
        UserError: the task has no such split, or it is several splits of the hub.
    """
    assert task.hub is not None
    names = evaluation_splits(task, split)
    if len(names) > 1:
        raise UserError(f"task {task.name}: {split} is {' and '.join(names)} on the hub; select one of them")
    name = task.hub.splits.get(split, split)
    return _part(task, name[0] if isinstance(name, list) else name)


def is_local(task: TaskConfig, data: DataConfig) -> bool:
    """Whether the task is read from `data.dir`, which must have any task but a corpus.

    Raises:
        UserError: `data.dir` is not a folder.
    """
    if data.dir is None:
        return False
    if not resolve_path(data.dir, "data.dir").is_dir():
        raise UserError(
            f"data.dir={data.dir}: no such folder; data.dir=null reads the hub, or the task's corpus"
        )
    return task.corpus is None or _folder(task, data).is_dir()


def local_part(task: TaskConfig, data: DataConfig, split: str) -> tuple[SplitFiles, Part]:
    """The local files of a split, and the part of their rows.

    Raises:
        UserError: the folder, the files or a shard are missing; lists what exists.
    """
    files = _files(task, data)
    found = _find(task, files, split)
    if found is not None:
        found[0].check_complete()
        return found
    folder = _folder(task, data)
    similar = difflib.get_close_matches(split, [*SPLITS, *files], 1) if split not in SPLITS else []
    raise UserError(
        f"{folder} has no {split}{f' (did you mean {similar[0]}?)' if similar else ''}: it holds "
        f"{listed(contents(folder))}\nExpected {split} with an extension {READABLE}, shards "
        f"{split}-00000-of-00002.parquet, or a folder of save_to_disk{_hint(split, '; ')}{_without_local(task)}"
    )


def no_source(task: TaskConfig, split: str) -> UserError:
    return UserError(
        f"task {task.name} has neither hub nor corpus, so its rows must be local\n"
        f"data.dir=DIR reads DIR/{task.name}/{split}.parquet (jsonl, json, csv, tsv)"
    )


def _hint(split: str, separator: str = "\n") -> str:
    take = f"data.split.{split}=0.1 takes a tenth of the training rows for it"
    return f"{separator}for training, {take}" if split in HELD_OUT else ""


def _without_local(task: TaskConfig) -> str:
    return "" if task.hub is None else "; without data.dir, the hub is read"


def _has_split(task: TaskConfig, data: DataConfig, split: str) -> bool:
    """Whether a task has a split without `data.split`."""
    if is_local(task, data):
        files = _files(task, data)
        return any(name in files for name in _published(task, split)) or bool(_find(task, files, split))
    return split in SPLITS if task.corpus is not None else bool(_published(task, split))


def _find(task: TaskConfig, files: dict[str, SplitFiles], split: str) -> tuple[SplitFiles, Part] | None:
    published = _published(task, split)
    parts = _parts(task)
    part = parts.get(split)
    if split in files:
        # If train.parquet holds train and validation, as on the hub, each is its part; separate files are whole.
        is_shared = any(
            other.name == split and ours not in files for ours, other in parts.items() if ours != split
        )
        is_part = part is not None and part.name == split and is_shared
        return files[split], part if part is not None and is_part else Part(split)
    if len(published) == 1 and published[0] in files:
        return files[published[0]], Part(published[0])
    ours = family(task, split)
    if ours in files and _published(task, ours)[0] == split:
        return files[ours], Part(ours)
    return (files[part.name], part) if part is not None and part.name in files else None


def _published(task: TaskConfig, split: str) -> list[str]:
    """The hub's names of a split; our own if the hub's is a part, or one of ours with another meaning."""
    if task.hub is None:
        return []
    splits = task.hub.splits
    if split not in splits:
        return [split] if any(split in _published(task, ours) for ours in splits) else []
    names = splits[split] if isinstance(splits[split], list) else [splits[split]]
    return list(dict.fromkeys(split if "[" in name or name in SPLITS else name for name in names))


def _parts(task: TaskConfig) -> dict[str, Part]:
    splits = task.hub.splits if task.hub is not None else {}
    parts = {split: _part(task, name) for split, name in splits.items() if isinstance(name, str)}
    return {split: part for split, part in parts.items() if not part.is_whole}


def _part(task: TaskConfig, name: str) -> Part:
    if "[" not in name:
        return Part(name)
    found = _PART.fullmatch(name)
    part = Part(found["name"], int(found["start"] or 0), int(found["stop"] or 100)) if found else None
    if part is None or part.start >= part.stop:
        raise UserError(
            f"task {task.name}: hub.splits has {name}; expected a name, or a part such as train[:90%]"
        )
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
            f"Expected {folder}/<split>.parquet (jsonl, json, csv, tsv){_without_local(task)}"
        )
    return split_files(folder)

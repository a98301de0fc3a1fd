"""Where a task's splits are: files of a local folder, parts of a corpus, or names on the hub.

The hub names splits as it likes, and `hub.splits` of a task file says what our train, validation and test are
there: a name, a list of names, or a part of one such as `train[90%:]`. A part is taken after a fixed shuffle, since
some data sets are sorted by label.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fusion.config.data import DataConfig
from fusion.config.task import TaskConfig
from fusion.data.files import READABLE, SplitFiles, contents, split_files
from fusion.data.holdout import Holdout
from fusion.errors import UserError
from fusion.files import check_relative, resolve_path
from fusion.tasks.table import kind_of
from fusion.text import listed

SPLITS = ("train", "validation", "test")
MADE = ("validation", "test")  # those that `data.split` can make of the training rows

_PART = re.compile(r"(?P<name>[^\[\]]+)\[(?P<start>\d{0,2})%?:(?P<stop>\d{0,2})%?\]")


@dataclass(frozen=True)
class Part:
    """A split's name, and the percents of its rows that are meant."""

    name: str
    start: int = 0
    stop: int = 100

    @property
    def is_whole(self) -> bool:
        return (self.start, self.stop) == (0, 100)


def evaluation_splits(task: TaskConfig, split: str, data: DataConfig | None = None) -> list[str]:
    """What `split` stands for, as the hub names it: two sets for the validation of MNLI.

    Args:
        split: train, validation, test, or the hub's own name of a split.
        data: where the rows are; a local folder may hold one file where the hub has two.

    Raises:
        UserError: the task has no such split.
    """
    published = _published(task, split)
    if data is not None and holdout(task, data, split) is not None:
        return [split]
    if data is not None and is_local(task, data):
        there = _files(task, data)
        named = [split] if split in there else [name for name in published if name in there]
        if not named:
            local_part(task, data, split)
        return named or [split]
    if task.hub is None or task.corpus is not None:
        known, published = list(SPLITS), [split] if split in SPLITS else []
    else:
        known = list(
            dict.fromkeys([*task.hub.splits, *(n for s in task.hub.splits for n in _published(task, s))])
        )
    if not published:
        made = f"\nIn training, {_to_make(split)}" if split in MADE else ""
        raise UserError(f"task {task.name} has no split {split}: expected one of {', '.join(known)}{made}")
    return published


def holdout(task: TaskConfig, data: DataConfig, split: str) -> Holdout | None:
    """How a split is made of the training rows by `data.split`; None: it is read as it is.

    Where a task has a split of its own, `data.split` does not concern that split.
    """
    ours = family(task, split)
    asked = {made: getattr(data.split, made) for made in MADE}
    if not any(asked.values()) or ours is None:
        return None
    fractions = {
        made: fraction
        for made, fraction in asked.items()
        if fraction is not None and not _has_split(task, data, made)
    }
    if not fractions or (ours != "train" and split not in fractions):
        return None
    return Holdout(ours, fractions, data.split.seed, data.split.stratify)


def drawn_from_train(task: TaskConfig, data: DataConfig, split: str) -> bool:
    """Whether a split is a share of the rows from which the training rows are drawn too.

    Raises:
        UserError: the task has no such split.
    """
    made = holdout(task, data, split)
    if made is not None or (family(task, split) or "train") == "train":
        return made is not None and made.split != "train"
    if is_local(task, data):
        return not local_part(task, data, split)[1].is_whole
    return task.corpus is None and task.hub is not None and not hub_part(task, split).is_whole


def _has_split(task: TaskConfig, data: DataConfig, split: str) -> bool:
    """Whether a task has a split without `data.split`."""
    if is_local(task, data):
        there = _files(task, data)
        return (
            any(name in there for name in _published(task, split)) or _found(task, there, split) is not None
        )
    if task.corpus is not None:
        return split in SPLITS
    return bool(_published(task, split))


def check_made_splits(tasks: Iterable[TaskConfig], data: DataConfig) -> None:
    """Refuse `data.split` where no task of a run has a use for it.

    Raises:
        UserError: all tasks have the split themselves, or one to be split has no classes to stratify by.
    """
    every = list(tasks)
    for made in MADE:
        fraction = getattr(data.split, made)
        if fraction is None:
            continue
        without = [task for task in every if not _has_split(task, data, made)]
        if not without:
            names = ", ".join(str(task.name) for task in every)
            raise UserError(
                f"data.split.{made}={fraction:g}: {names} {'has' if len(every) == 1 else 'have'} a {made} split of "
                f"{'its' if len(every) == 1 else 'their'} own; leave it out"
            )
        for task in without:
            if data.split.stratify and not kind_of(task).has_classes:
                raise UserError(
                    f"data.split.stratify=true: {task.name} is of kind {task.kind} and has no classes to stratify by; "
                    "expected data.split.stratify=false"
                )


def family(task: TaskConfig, split: str) -> str | None:
    """Which of train, validation and test a split is, None for one that is none of them."""
    if split in SPLITS:
        return split
    return next((ours for ours in SPLITS if split in _published(task, ours)), None)


def hub_part(task: TaskConfig, split: str) -> Part:
    """What to load from the hub for one split.

    Raises:
        UserError: the task has no such split, or it stands for several.
    """
    assert task.hub is not None
    names = evaluation_splits(task, split)
    if len(names) > 1:
        raise UserError(f"task {task.name}: {split} is {' and '.join(names)} on the hub: name one of them")
    said = task.hub.splits.get(split, split)
    return _part(task, said[0] if isinstance(said, list) else said)


def is_local(task: TaskConfig, data: DataConfig) -> bool:
    """Whether `data.dir` is read: it must hold any task but a corpus, which every machine can have.

    Raises:
        UserError: `data.dir` is no folder.
    """
    if data.dir is None:
        return False
    if not resolve_path(data.dir, "data.dir").is_dir():
        raise UserError(
            f"data.dir={data.dir}: no such folder; data.dir=null reads the hub, or the task's own corpus"
        )
    return task.corpus is None or _folder(task, data).is_dir()


def local_part(task: TaskConfig, data: DataConfig, split: str) -> tuple[SplitFiles, Part]:
    """The files that hold a split, and which part of it.

    Raises:
        UserError: the folder, the files or one of the shards are missing; says what is there.
    """
    files, part = _local_part(task, data, split)
    files.check_complete()
    return files, part


def _local_part(task: TaskConfig, data: DataConfig, split: str) -> tuple[SplitFiles, Part]:
    there = _files(task, data)
    if (found := _found(task, there, split)) is not None:
        return found
    folder = _folder(task, data)
    holds = contents(folder)
    unread = [name for name in holds if re.match(rf"(data/)?{re.escape(split)}[.-]", name)]
    reason = f" ({listed(unread)} has no ending that is read)" if unread else ""
    made = f"; in training, {_to_make(split)}" if split in MADE else ""
    if (
        task.hub is None
        and split not in SPLITS
        and (meant := difflib.get_close_matches(split, {*SPLITS, *there}, 1))
    ):
        raise UserError(f"{folder} has no {split}: did you mean {meant[0]}? It holds {listed(holds)}{reason}")
    raise UserError(
        f"{folder} has no {split}: it holds {listed(holds)}{reason}\n"
        f"Expected {folder}/{split} with an ending {READABLE}, shards {split}-00000-of-00002.parquet, or a folder "
        f"{split} of save_to_disk{made}{_elsewhere(task)}"
    )


def _to_make(split: str) -> str:
    return f"data.split.{split}=0.1 takes a tenth of the training rows for it"


def _elsewhere(task: TaskConfig) -> str:
    return "" if task.hub is None else "; without data.dir the hub's copy is used"


def _found(task: TaskConfig, there: dict[str, SplitFiles], split: str) -> tuple[SplitFiles, Part] | None:
    """The files of a split among those that are there; None: it is not."""
    published = _published(task, split)
    parts = _parts(task)
    part = parts.get(split)
    if split in there:
        # A folder in the hub's form has train alone for train and validation; one with a file for each has whole files.
        shared = part is not None and any(
            other.name == split and ours not in there for ours, other in parts.items() if ours != split
        )
        return there[split], part if part is not None and part.name == split and shared else Part(split)
    if len(published) == 1 and published[0] in there:
        return there[published[0]], Part(published[0])
    ours = family(task, split)
    if ours in there and _published(task, ours)[0] == split:
        return there[ours], Part(ours)
    if part is not None and part.name in there:
        return there[part.name], part
    return None


def check_source(task: TaskConfig, data: DataConfig, splits: Iterable[str] = ("train", "validation")) -> None:
    """Refuse, without reading any row, a split that the task or its local folder does not have.

    Raises:
        UserError: says what is there.
    """
    for split in splits:
        if (made := holdout(task, data, split)) is not None and made.split != "train":
            split = "train"
        if is_local(task, data):
            for name in evaluation_splits(task, split, data):
                local_part(task, data, name)
        elif task.hub is None and task.corpus is None:
            raise no_source(task, split)
        else:
            evaluation_splits(task, split)


def no_source(task: TaskConfig, split: str) -> UserError:
    return UserError(
        f"task {task.name} says neither hub nor corpus, so its rows can only be local\n"
        f"data.dir=DIR reads DIR/{task.name}/{split}.parquet (jsonl, json, csv, tsv)"
    )


def _published(task: TaskConfig, split: str) -> list[str]:
    """The hub's names for a split; our own where the hub's is one of ours with another meaning, or a part."""
    if task.hub is None:
        return []
    splits = task.hub.splits
    if split not in splits:
        return [split] if any(split in _published(task, ours) for ours in splits) else []
    names = splits[split] if isinstance(splits[split], list) else [splits[split]]
    return list(dict.fromkeys(split if "[" in name or name in SPLITS else name for name in names))


def _parts(task: TaskConfig) -> dict[str, Part]:
    """The splits that are parts of a split."""
    said = task.hub.splits if task.hub is not None else {}
    parts = {split: _part(task, name) for split, name in said.items() if isinstance(name, str)}
    return {split: part for split, part in parts.items() if not part.is_whole}


def _part(task: TaskConfig, name: str) -> Part:
    if "[" not in name:
        return Part(name)
    found = _PART.fullmatch(name)
    part = Part(found["name"], int(found["start"] or 0), int(found["stop"] or 100)) if found else None
    if part is None or part.start >= part.stop:
        raise UserError(
            f"task {task.name}: hub.splits has {name}: expected a name, or a part such as train[:90%]"
        )
    return part


def _folder(task: TaskConfig, data: DataConfig) -> Path:
    assert data.dir is not None
    if (why := check_relative(str(task.name))) is not None:
        raise UserError(f"task {listed([str(task.name)])} is no folder of data.dir: {why}")
    return resolve_path(data.dir, "data.dir") / str(task.name)


def _files(task: TaskConfig, data: DataConfig) -> dict[str, SplitFiles]:
    """What the task's folder holds, by the name of the split."""
    folder = _folder(task, data)
    if not folder.is_dir():
        there = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
        raise UserError(
            f"data.dir={data.dir} has no folder {task.name}: it holds {listed(there)}\n"
            f"Expected {folder}/<split>.parquet (jsonl, json, csv, tsv){_elsewhere(task)}"
        )
    return split_files(folder)

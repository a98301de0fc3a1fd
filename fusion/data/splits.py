"""Where a task's splits are: files of a local folder, parts of a corpus, or splits on the hub.

The hub has its own names of splits; `hub.splits` of a task file maps train, validation and test to them: a name, a
list of names, or a part of a split such as `train[90%:]`. Limits, parts and held-out splits are random draws, each with
its own fixed seed. A draw never changes: RandomState's stream is frozen (NEP 19), unlike Generator's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusion.config.data import DataConfig
from fusion.config.task import TaskConfig
from fusion.data.files import READABLE, SplitFiles, contents, split_files
from fusion.errors import UserError
from fusion.files import check_relative, resolve_path
from fusion.tasks.table import kind_of
from fusion.text import did_you_mean, listed

SPLITS = ("train", "validation", "test")
HELD_OUT = ("validation", "test")  # those that `data.split` can take from the training rows

_LIMIT_SEED = 20_200_501
_PART_SEED = 20_210_419
_HOLDOUT_SEED = 20_261_128
_PART = re.compile(r"(?P<name>[^\[\]]+)\[(?P<start>\d{0,2})%?:(?P<stop>\d{0,2})%?\]")


class Part(NamedTuple):
    """The name of a split, and a range of its rows in percent."""

    name: str
    start: int = 0
    stop: int = 100

    @property
    def is_whole(self) -> bool:
        return (self.start, self.stop) == (0, 100)


class Place(NamedTuple):
    """Where the rows of a split are.

    Attributes:
        files: local ones; None: on the hub, or in the corpus.
        part: the split there, and which of its rows.
        held_out: how these rows are divided into splits; None: all of them are the split.
    """

    files: SplitFiles | None
    part: Part
    held_out: Holdout | None = None


def evaluation_splits(task: TaskConfig, split: str, data: DataConfig) -> list[str]:
    """The hub's names of `split`, of which a local folder may lack some; MNLI has two validation splits.

    `split` is train, validation, test, or the hub's own name of a split. Raises UserError if the task does not have it.
    """
    if _holdout(task, data, split) is not None:
        return [split]
    names = _published(task, split)
    if _is_local(task, data):
        files = _files(task, data)
        return [split] if split in files else [name for name in names if name in files] or [split]
    if not names:
        known = [*_splits_of(task), *(name for ours in _splits_of(task) for name in _published(task, ours))]
        raise UserError(
            f"task {task.name} has no split {split}: expected one of {', '.join(dict.fromkeys(known))}\n{_hint(split)}"
        )
    return names


def locate(task: TaskConfig, data: DataConfig, split: str) -> Place:
    """Where the rows of one of the `evaluation_splits` are.

    Raises UserError if the folder, the split or a shard is missing; lists what exists.
    """
    held_out = _holdout(task, data, split)
    if held_out is not None and held_out.split != "train":
        split = "train"  # of which it is a part
    if _is_local(task, data):
        files = _files(task, data)
        found = _find(task, files, split)
        if found is None:
            similar = "" if split in SPLITS else did_you_mean(split, [*SPLITS, *files]).replace(":", ";")
            raise UserError(
                f"{_folder(task, data)} has no {split}: it holds {listed(contents(_folder(task, data)))}{similar}\n"
                f"Expected {split} with an extension {READABLE}, shards {split}-00000-of-00002.parquet, or a folder of "
                f"save_to_disk; {_hint(split)}".removesuffix("; ")
            )
        files[found.name].check_complete()
        return Place(files[found.name], found, held_out)
    names = evaluation_splits(task, split, data)
    if len(names) > 1:
        raise UserError(f"task {task.name}: {split} is {' and '.join(names)} on the hub; select one of them")
    name = _splits_of(task).get(split, split)
    return Place(None, _part(task, name[0] if isinstance(name, list) else name), held_out)


def _holdout(task: TaskConfig, data: DataConfig, split: str) -> Holdout | None:
    """How `data.split` takes a split that the task does not have from the training rows; None: it is read as it is."""
    ours = family(task, split)
    fractions = {
        name: fraction
        for name in HELD_OUT
        if (fraction := getattr(data.split, name)) is not None and ours is not None and not _has_split(task, data, name)
    }
    if ours is None or not fractions or ours not in ("train", *fractions):
        return None
    return Holdout(ours, fractions, data.split.seed, data.split.stratify)


def drawn_from_train(task: TaskConfig, data: DataConfig, split: str) -> bool:
    """Whether a split is a share of the rows from which the training rows are drawn, too."""
    place = locate(task, data, split)
    is_share = place.held_out is not None or not place.part.is_whole
    return is_share and family(task, split) not in ("train", None)


def check_held_out_splits(tasks: Iterable[TaskConfig], data: DataConfig) -> None:
    """Raises UserError if all tasks of a run have the split of `data.split`, or one has no classes to stratify by."""
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
    """Raises UserError, without reading any row, if a split is missing; lists those that exist."""
    for split in splits:
        for name in evaluation_splits(task, split, data):
            locate(task, data, name)


def family(task: TaskConfig, split: str) -> str | None:
    """Which of train, validation and test a split is; None: none of them."""
    if split in SPLITS:
        return split
    return next((ours for ours in SPLITS if split in _published(task, ours)), None)


def _is_local(task: TaskConfig, data: DataConfig) -> bool:
    """Whether the task is read from `data.dir`, which must have any task but a corpus."""
    if data.dir is None and task.hub is None and task.corpus is None:
        raise UserError(
            f"task {task.name} has neither hub nor corpus, so its rows must be local\n"
            f"data.dir=DIR reads DIR/{task.name}/SPLIT.parquet (jsonl, json, csv, tsv)"
        )
    if data.dir is None:
        return False
    if not resolve_path(data.dir, "data.dir").is_dir():
        raise UserError(f"data.dir={data.dir}: no such folder; data.dir=null reads the hub, or the task's corpus")
    return task.corpus is None or _folder(task, data).is_dir()


def _hint(split: str) -> str:
    if split not in HELD_OUT:
        return ""
    return f"for training, data.split.{split}=0.1 takes a tenth of the training rows for it"


def _has_split(task: TaskConfig, data: DataConfig, split: str) -> bool:
    """Whether a task has a split without `data.split`."""
    if not _is_local(task, data):
        return bool(_published(task, split))
    files = _files(task, data)
    return any(name in files for name in _published(task, split)) or _find(task, files, split) is not None


def _find(task: TaskConfig, files: dict[str, SplitFiles], split: str) -> Part | None:
    """Which of the local files a split is, and which part of it."""
    named = {ours: _part(task, name) for ours, name in _splits_of(task).items() if isinstance(name, str)}
    parts = {ours: part for ours, part in named.items() if not part.is_whole}
    part = parts.get(split, Part(split))
    if split in files:
        # If train.parquet holds train and validation, as on the hub, each is its part; separate files are whole.
        is_shared = any(ours not in files and other.name == split for ours, other in parts.items())
        return part if part.name == split and is_shared else Part(split)
    published, ours = _published(task, split), family(task, split)
    if len(published) == 1 and published[0] in files:
        return Part(published[0])
    if ours in files and _published(task, ours)[0] == split:
        return Part(ours)
    return part if part.name in files else None


def _splits_of(task: TaskConfig) -> dict[str, Any]:
    """The hub's names by our own; a corpus has ours."""
    if task.corpus is not None:
        return {split: split for split in SPLITS}
    return {} if task.hub is None else task.hub.splits


def _published(task: TaskConfig, split: str) -> list[str]:
    """The hub's names of a split; our own if the hub's is a part, or one of ours with another meaning."""
    splits = _splits_of(task)
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
            f"Expected {folder}/SPLIT.parquet (jsonl, json, csv, tsv)"
        )
    return split_files(folder)


# --- draws --------------------------------------------------------------------------------------------


def limited_rows(count: int, limit: int) -> list[int]:
    """`limit` of `count` rows, ascending."""
    return np.sort(np.random.RandomState(_LIMIT_SEED).permutation(count)[:limit]).tolist()


def part_rows(count: int, start: int, stop: int) -> list[int]:
    """The rows from `start` to `stop` percent of a fixed shuffle, ascending: some data sets are sorted by label."""
    order = np.random.RandomState(_PART_SEED).permutation(count)
    return np.sort(order[count * start // 100 : count * stop // 100]).tolist()


@dataclass(frozen=True)
class Holdout:
    """A division of the training rows into splits.

    `split` is the part that is meant: train (the rows that are left), validation or test. `fractions` are of each split,
    in the order of their draws. With `stratify`, each part has the labels in the proportions of the whole.
    """

    split: str
    fractions: Mapping[str, float]
    seed: int = 0
    stratify: bool = False

    def rows(self, count: int, labels: Sequence[Any] | None, where: str) -> list[int]:
        """The rows of the part, ascending, out of `count` rows with these labels. Raises UserError if a part is empty."""
        order = np.random.RandomState([_HOLDOUT_SEED, self.seed]).permutation(count)
        groups = [order]
        if self.stratify:
            assert labels is not None
            shuffled = np.asarray(labels)[order]
            groups = [order[shuffled == label] for label in np.unique(shuffled)]
        counts = np.array([len(group) for group in groups])
        taken = np.zeros(len(groups), np.int64)
        parts = {}
        for split, fraction in self.fractions.items():
            # With stratify, one row of each label stays in train.
            sizes = _sizes(fraction, counts, np.maximum(counts - taken - int(self.stratify), 0))
            ranges = zip(groups, taken, taken + sizes, strict=True)
            parts[split] = np.concatenate([group[start:end] for group, start, end in ranges])
            taken += sizes
        parts["train"] = np.concatenate([group[start:] for group, start in zip(groups, taken, strict=True)])
        if empty := [split for split, rows in parts.items() if not len(rows)]:
            fractions = ", ".join(f"data.split.{split}={share:g}" for split, share in self.fractions.items())
            raise UserError(
                f"{where}: {fractions} of {count} training rows leave no row for {', '.join(empty)}\n"
                "Change the fraction, or add rows"
            )
        return np.sort(parts[self.split]).tolist()


def _sizes(fraction: float, counts: NDArray[np.int64], room: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many rows of each group a part takes: its share of `counts`, at most `room`, by the largest remainder method."""
    wanted = math.floor(fraction * counts.sum() + 0.5)
    exact = fraction * counts.astype(np.float64)
    sizes = np.minimum(np.floor(exact + 1e-9).astype(np.int64), room)
    for group in np.argsort(-(exact - sizes), kind="stable"):
        if sizes.sum() >= wanted:
            break
        sizes[group] += int(room[group] > sizes[group])
    return sizes

"""Locations of a task's splits: files of a local folder, parts of a corpus, or splits on the Hub.

`hub.splits` of a task file maps train, validation and test to the split names on the Hub: a name, a list of names, or a
part of a split such as `train[90%:]`. Limits, parts and held-out splits are random samples, each with its own fixed
seed. They are the same for every NumPy version, since the stream of `RandomState` is frozen (NEP 19).
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
from fusion.data.tables import READABLE, SplitFiles, contents, split_files
from fusion.errors import UserError
from fusion.files import check_relative, resolve_path
from fusion.tasks.table import kind_of
from fusion.text import did_you_mean, listed

SPLITS = ("train", "validation", "test")
HELD_OUT = ("validation", "test")  # splits that `data.split` can take from the training examples

_LIMIT_SEED = 20_200_501
_PART_SEED = 20_210_419
_HOLDOUT_SEED = 20_261_128
_FOLD_SEED = 20_261_130
_PART = re.compile(r"(?P<name>[^\[\]]+)\[(?P<start>\d{0,2})%?:(?P<stop>\d{0,2})%?\]")


class Part(NamedTuple):
    """The name of a split, and a range of its examples in percent."""

    name: str
    start: int = 0
    stop: int = 100

    @property
    def is_whole(self) -> bool:
        return (self.start, self.stop) == (0, 100)


class Place(NamedTuple):
    """Location of the examples of a split."""

    files: SplitFiles | None  # local files, or `None` for the Hub or a corpus
    part: Part  # name of the split at this location, and the range of its examples
    held_out: Holdout | None = None  # how these examples are divided into splits, or `None` if they are not


def evaluation_splits(task: TaskConfig, split: str, data: DataConfig) -> list[str]:
    """Return the names on the Hub that `split` refers to (two for MNLI validation), or those in the local folder.

    `split` is train, validation, test, or a name on the Hub. Raises UserError if it does not exist on the Hub.
    """
    if _holdout(task, data, split) is not None:
        return [split]
    if _is_local(task, data):
        files = _files(task, data)
        return [split] if split in files else [name for name in _published(task, split) if name in files] or [split]
    return _on_hub(task, split)


def _on_hub(task: TaskConfig, split: str) -> list[str]:
    if names := _published(task, split):
        return names
    known = ", ".join(
        dict.fromkeys([*_splits_of(task), *(n for ours in _splits_of(task) for n in _published(task, ours))])
    )
    raise UserError(f"task {task.name} has no split {split}: expected one of {known}\n{_hint(split)}".rstrip())


def locate(task: TaskConfig, data: DataConfig, split: str) -> Place:
    """Locate the examples of one of the `evaluation_splits`.

    Raises UserError if the folder, the split or a shard is missing.
    """
    held_out = _holdout(task, data, split)
    if held_out is not None and held_out.split != "train":
        split = "train"  # the split is a part of it
    if _is_local(task, data):
        files = _files(task, data)
        found = _find(task, files, split)
        if found is None:
            similar = "" if split in SPLITS else did_you_mean(split, [*SPLITS, *files]).replace(":", ";")
            raise UserError(
                f"{_folder(task, data)} has no {split}: it contains {listed(contents(_folder(task, data)))}{similar}\n"
                f"Expected {split} with an extension {READABLE}, shards {split}-00000-of-00002.parquet, or a save_to_disk "
                f"folder; {_hint(split)}".removesuffix("; ")
            )
        files[found.name].check_complete()
        return Place(files[found.name], found, held_out)
    names = _on_hub(task, split)
    if len(names) > 1:
        raise UserError(f"task {task.name}: {split} is {' and '.join(names)} on the Hub; select one of them")
    name = _splits_of(task).get(split, split)
    return Place(None, _part(task, name[0] if isinstance(name, list) else name), held_out)


def _holdout(task: TaskConfig, data: DataConfig, split: str) -> Holdout | None:
    """Return how `data.split` samples the split from the training examples, or `None` if it does not."""
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
    """Return whether a split is sampled from the same examples as the training split."""
    places = [locate(task, data, name) for name in evaluation_splits(task, split, data)]
    is_share = any(place.held_out is not None or not place.part.is_whole for place in places)
    return is_share and family(task, split) not in ("train", None)


def check_held_out_splits(tasks: Sequence[TaskConfig], data: DataConfig) -> None:
    """Raise UserError if all tasks of a run have the split of `data.split`, or a task cannot be stratified."""
    for split in HELD_OUT:
        if (fraction := getattr(data.split, split)) is None:
            continue
        without = [task for task in tasks if not _has_split(task, data, split)]
        if not without:
            names = ", ".join(str(task.name) for task in tasks)
            raise UserError(f"data.split.{split}={fraction:g}: {names} already has a {split} split; leave it out")
        if data.split.stratify and (wrong := [task for task in without if not kind_of(task).has_classes]):
            raise UserError(
                f"data.split.stratify=true: {wrong[0].name} is of kind {wrong[0].kind}, which has no classes; "
                "expected data.split.stratify=false"
            )


def check_source(task: TaskConfig, data: DataConfig, splits: Iterable[str] = ("train", "validation")) -> None:
    """Raise UserError if a split is missing, without reading any data."""
    for split in splits:
        for name in evaluation_splits(task, split, data):
            locate(task, data, name)


def family(task: TaskConfig, split: str) -> str | None:
    """Return `train`, `validation` or `test` for a split name, or `None` if it is none of them."""
    if split in SPLITS:
        return split
    return next((ours for ours in SPLITS if split in _published(task, ours)), None)


def _is_local(task: TaskConfig, data: DataConfig) -> bool:
    """Return whether the task is read from `data.dir`; only a corpus task may be missing in it."""
    if data.dir is None and task.hub is None and task.corpus is None:
        raise UserError(
            f"task {task.name} has neither hub nor corpus, so its data must be local\n"
            f"Set data.dir=DIR to read DIR/{task.name}/SPLIT.parquet (jsonl, json, csv, tsv)"
        )
    if data.dir is None:
        return False
    if not resolve_path(data.dir, "data.dir").is_dir():
        raise UserError(f"data.dir={data.dir}: no such folder; set data.dir=null to read the Hub or the task's corpus")
    return task.corpus is None or _folder(task, data).is_dir()


def _hint(split: str) -> str:
    text = f"for training, set data.split.{split}=0.1 to hold out a tenth of the training examples"
    return text if split in HELD_OUT else ""


def _has_split(task: TaskConfig, data: DataConfig, split: str) -> bool:
    """Return whether the task itself provides the split, without `data.split`."""
    if not _is_local(task, data):
        return bool(_published(task, split))
    files = _files(task, data)
    return any(name in files for name in _published(task, split)) or _find(task, files, split) is not None


def _find(task: TaskConfig, files: dict[str, SplitFiles], split: str) -> Part | None:
    """Return the local file, and the part of it, that contains a split."""
    named = {ours: _part(task, name) for ours, name in _splits_of(task).items() if isinstance(name, str)}
    parts = {ours: part for ours, part in named.items() if not part.is_whole}
    part = parts.get(split, Part(split))
    if split in files:
        # If train.parquet contains train and validation, as on the Hub, each is a part of it; separate files are whole.
        is_shared = any(ours not in files and other.name == split for ours, other in parts.items())
        return part if part.name == split and is_shared else Part(split)
    published, ours = _published(task, split), family(task, split)
    if len(published) == 1 and published[0] in files:
        return Part(published[0])
    if ours in files and _published(task, ours)[0] == split:
        return Part(ours)
    return part if part.name in files else None


def _splits_of(task: TaskConfig) -> dict[str, Any]:
    """Return the names on the Hub by split; those of a corpus are the same."""
    if task.corpus is not None:
        return {split: split for split in SPLITS}
    return {} if task.hub is None else task.hub.splits


def _published(task: TaskConfig, split: str) -> list[str]:
    """Return the names of a split on the Hub; the local name for a part or a name with a different local meaning."""
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
        raise UserError(
            f"task {task.name}: invalid name {name} in hub.splits; expected a name, or a part such as train[:90%]"
        )
    return part


def _folder(task: TaskConfig, data: DataConfig) -> Path:
    assert data.dir is not None
    if (reason := check_relative(str(task.name))) is not None:
        raise UserError(f"task {listed([str(task.name)])} is not a subfolder of data.dir: {reason}")
    return resolve_path(data.dir, "data.dir") / str(task.name)


def _files(task: TaskConfig, data: DataConfig) -> dict[str, SplitFiles]:
    """Return the files in the task's folder, by split."""
    folder = _folder(task, data)
    if not folder.is_dir():
        folders = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
        raise UserError(
            f"data.dir={data.dir} has no folder {task.name}: it contains {listed(folders)}\n"
            f"Expected {folder}/SPLIT.parquet (jsonl, json, csv, tsv)"
        )
    return split_files(folder)


def limited_rows(count: int, limit: int, seed: int | None = None) -> list[int]:
    """Sample `limit` of `count` indices, ascending. For a given seed, a smaller sample is part of a larger one."""
    drawn = np.random.RandomState(_LIMIT_SEED if seed is None else [_LIMIT_SEED, seed])
    return np.sort(drawn.permutation(count)[:limit]).tolist()


def fold_of_each(count: int, folds: int, classes: Sequence[int] | None, where: str) -> NDArray[np.int64]:
    """Divide examples into folds of equal size, stratified by class: (count,), the fold of each example.

    Raises UserError if there are fewer examples than folds.

    Args:
        classes: (count,) class of each example, or `None` without classes.
        where: start of the error message.
    """
    if count < folds:
        raise UserError(f"{where}: {count} examples cannot be divided into {folds} folds")
    order = np.random.RandomState(_FOLD_SEED).permutation(count)
    if classes is not None:
        order = order[np.argsort(np.asarray(classes)[order], kind="stable")]
    found = np.empty(count, np.int64)
    found[order] = np.arange(count) % folds
    return found


def part_rows(count: int, start: int, stop: int) -> list[int]:
    """Return the indices from `start` to `stop` percent of a fixed shuffle, since some datasets are sorted by label."""
    order = np.random.RandomState(_PART_SEED).permutation(count)
    return np.sort(order[count * start // 100 : count * stop // 100]).tolist()


@dataclass(frozen=True)
class Holdout:
    """A division of the training examples into splits."""

    split: str  # the split to return: train (the remaining examples), validation or test
    fractions: Mapping[str, float]  # by split, in sampling order
    seed: int = 0
    stratify: bool = False  # whether each split preserves the label proportions

    def rows(self, count: int, labels: Sequence[Any] | None, where: str) -> list[int]:
        """Return the ascending indices of the split, out of `count`. Raises UserError if a split is empty."""
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
            # With stratify, one example of each label stays in train.
            sizes = _sizes(fraction, counts, np.maximum(counts - taken - int(self.stratify), 0))
            ranges = zip(groups, taken, taken + sizes, strict=True)
            parts[split] = np.concatenate([group[start:end] for group, start, end in ranges])
            taken += sizes
        parts["train"] = np.concatenate([group[start:] for group, start in zip(groups, taken, strict=True)])
        if empty := [split for split, rows in parts.items() if not len(rows)]:
            fractions = ", ".join(f"data.split.{split}={fraction:g}" for split, fraction in self.fractions.items())
            raise UserError(
                f"{where}: {fractions} of {count} training examples leave no example for {', '.join(empty)}\n"
                "Change the fraction, or add examples"
            )
        return np.sort(parts[self.split]).tolist()


def _sizes(fraction: float, counts: NDArray[np.int64], available: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sample size of each group: a fraction of `counts`, at most `available`, by the largest remainder method."""
    wanted = math.floor(fraction * counts.sum() + 0.5)
    exact = fraction * counts.astype(np.float64)
    sizes = np.minimum(np.floor(exact + 1e-9).astype(np.int64), available)
    for group in np.argsort(-(exact - sizes), kind="stable"):
        if sizes.sum() >= wanted:
            break
        sizes[group] += int(available[group] > sizes[group])
    return sizes

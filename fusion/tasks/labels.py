"""Mapping of raw labels to class ids, or to indices of the correct choice.

The mapping depends only on the task file and the raw label, so it is the same in every split: a raw label is mapped to
the label whose `label_values` contain it, else to the label with that name. Numbers are ids (and booleans the ids 0 and
1) only if neither names nor `label_values` are numbers (booleans). Other labels in the column can only cause an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusion.errors import UserError
from fusion.tasks.columns import Column
from fusion.tasks.task import Task
from fusion.text import hydra_value, listed, override, shown

_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_MAX_DIGITS = 400  # enough for every float64

# ClassLabel names of Hub datasets whose labels have different names in the shipped task file, by the names in `labels`.
# They are not `label_values` of these files, since the tasks in manifests of version 0.1 have none.
_HUB_NAMES = {
    ("negative", "positive"): ("neg", "pos"),
    ("world", "sports", "business", "sci_tech"): ("World", "Sports", "Business", "Sci/Tech"),
    ("abbreviation", "entity", "description", "human", "location", "number"): (
        *("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
    ),
}

Key = tuple[str, Any]
_MISSING: Key = ("missing", None)
Formats = dict[str, dict[Key, int]]
Choices = Sequence[Sequence[str]] | None


@dataclass(frozen=True)
class LabelFormat:
    """Format of the labels of one split.

    Attributes:
        names: formats that can decode every label, in order of precedence: label_values, names, ids or booleans. If
            several can decode a label, they agree on its class.
        ids: distinct class ids or indices.
        count: number of classes or choices.
        where: the file or dataset, for messages.
    """

    names: tuple[str, ...]
    ids: frozenset[int]
    count: int
    where: str


def parse_number(text: str) -> int | float | None:
    """Parse a number, which may be infinite. Returns `None` if the string is not a number."""
    if len(text) > _MAX_DIGITS or not _NUMBER.fullmatch(text):
        return None
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def label_key(value: Any) -> Key:
    """Return a key that is equal for equivalent raw labels: 1, "1" and 1.0; true and "true"; null and ""."""
    if isinstance(value, str):
        text = value.strip()
        if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
            return "boolean", text.lower() == "true"
        number = parse_number(text)
        if number is None or math.isinf(number):
            return ("text", value) if value else _MISSING
        value = number
    if value is None or value != value:  # NaN
        return _MISSING
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, float)):
        return "number", value
    return type(value).__name__, shown(value)


class Labels:
    """The labels of a task, and all formats in which they may be written.

    Raises UserError if two labels have the same raw label, such as 1 and "1".
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.names: list[str] = task.labels or []
        self._columns: list[str] = task.choices if isinstance(task.choices, list) else []
        values = [(raw, n) for n, entry in enumerate(task.raw_label_values) for raw in entry]
        names = [(name, n) for n, name in enumerate(self.names)]
        self._spelled: set[str] = set()
        self._by_value, by_name = self._by_key(values), self._by_key(names)
        # A name that is also the raw value of a different label is mapped to the latter.
        self._by_name = {key: n for key, n in by_name.items() if self._by_value.get(key, n) == n}
        self._known = [(label_key(raw), n) for raw, n in [*values, *names]]
        self._named = {*self._by_value, *by_name, *(key for key, _ in self._known)}
        self._ignore = {self.key(entry) for entry in task.ignore_labels}

    def _by_key(self, labels: Sequence[tuple[Any, int]]) -> dict[Key, int]:
        """Map keys to ids; different strings with the same key, such as "01" and "1", get keys by spelling."""
        groups: dict[Key, dict[Any, int]] = {}
        for raw, number in labels:
            groups.setdefault(label_key(raw), {})[raw] = number
        found: dict[Key, int] = {}
        for key, group in groups.items():
            if len(set(group.values())) == 1:
                found[key] = next(iter(group.values()))
            elif all(isinstance(raw, str) for raw in group):
                self._spelled |= group.keys()
                found |= {("spelled", raw): number for raw, number in group.items()}
            else:
                raise UserError(
                    f"label_values: {' and '.join(map(shown, group))} are the same raw label; remove one of them"
                )
        return found

    def key(self, value: Any) -> Key:
        """Return `label_key`, or a key by spelling if labels of the task differ only in spelling."""
        return ("spelled", value) if isinstance(value, str) and value in self._spelled else label_key(value)

    def keys(self, column: Column) -> list[Key]:
        """Return the keys of a column; the ids of a ClassLabel column are replaced by their names."""
        classes: list[Key] = []
        if column.names is not None:
            hub_names = _HUB_NAMES.get(tuple(self.names))
            names = self.names if column.names == hub_names else column.names
            classes = [
                ("column", self._columns.index(name)) if name in self._columns else self.key(name) for name in names
            ]

        listed_keys = self._named | self._ignore

        def key_of(value: Any) -> Key:
            if type(value) is int and 0 <= value < len(classes):
                return classes[value]
            key = self.key(value)
            # In a typed file such as JSON, a string is never an id.
            if column.table.typed and isinstance(value, str) and key not in listed_keys:
                return "text", value
            return key

        return [key_of(value) for value in column.values]

    def _formats(self, choices: int | None) -> Formats:
        """Return the ids by key, by format in order of precedence; `choices` is the maximum number of choices, if any."""
        columns: dict[Key, int] = {("column", number): number for number in range(len(self._columns))}
        formats = {"label_values": self._by_value, "names": self._by_name | columns}
        numbers = [(key[1], number) for key, number in self._known if key[0] == "number"]
        booleans = [(key[1], number) for key, number in self._known if key[0] == "boolean"]
        count = len(self.names) if choices is None else choices
        if not numbers and all(boolean == number for boolean, number in booleans):
            formats["ids"] = {("number", number): number for number in range(count)}
        if choices is None and count == 2 and not booleans and all(one == other for one, other in numbers):
            formats["booleans"] = {("boolean", False): 0, ("boolean", True): 1}
        return formats

    def ignored(self, column: Column, keys: Sequence[Key], unlabelled: bool) -> list[bool]:
        """Return which rows have no label by `ignore_labels`; if `unlabelled`, missing values are ignored, too."""
        ignore = self._ignore | ({_MISSING} if unlabelled else set())
        # `ignore_labels` may contain the id of a ClassLabel or its name.
        by_id = column.names is not None and all(self.key(name)[0] != "number" for name in column.names)
        return [
            key in ignore or (by_id and self.key(value) in ignore)
            for key, value in zip(keys, column.values, strict=True)
        ]

    def read(
        self, column: Column, keys: Sequence[Key], kept: Sequence[int], choices: Choices = None
    ) -> tuple[list[int], LabelFormat]:
        """Return class ids, or indices of the correct choice, of the rows `kept`, and their format.

        `keys` has all rows of the column, `choices` only those `kept`. Raises UserError if a label is unknown or not the
        index of a choice, or the labels have no common format.
        """
        count = len(self.names) if choices is None else max(map(len, choices))
        formats = self._formats(None if choices is None else count)
        distinct = {keys[row] for row in kept}
        fitting = [name for name, ids in formats.items() if distinct <= ids.keys()]
        if not fitting:
            raise self._unreadable(formats, column, keys, kept)
        ids = [formats[fitting[0]][keys[row]] for row in kept]
        for row, index, options in zip(kept, ids, choices or [], strict=choices is not None):
            if index >= len(options):
                value = column.values[row]
                raise UserError(
                    f"{column.table.at(row)}: {self.task.label} is {shown(value)}, the choice at {index}; expected an "
                    f"index from 0 to {len(options) - 1}\n"
                    + (ignore_hint(self.task, value) if 0 in ids else _count_from(1, count))
                )
        return ids, LabelFormat(tuple(fitting), frozenset(ids), count, column.table.where)

    def read_lists(self, column: Column, kept: Sequence[int]) -> tuple[list[list[int]], LabelFormat]:
        """Read a column of lists of labels, see `read`; ignored labels are removed from the lists."""
        row_of: list[int] = []  # the row of each raw label
        for row in kept:
            value = column.values[row]
            if not isinstance(value, (list, tuple)):
                raise UserError(
                    f"{column.table.at(row)}: {self.task.label} is {shown(value)}; expected a list of labels"
                )
            row_of += [row] * len(value)
        by_label = replace(column.table, row_name=lambda number: column.table.row_name(row_of[number]))
        flat = replace(column, values=[value for row in kept for value in column.values[row]], table=by_label)
        keys = self.keys(flat)
        used = [number for number, is_ignored in enumerate(self.ignored(flat, keys, False)) if not is_ignored]
        ids, written = self.read(flat, keys, used)
        found: dict[int, list[int]] = {row: [] for row in kept}
        for number, label in zip(used, ids, strict=True):
            found[row_of[number]].append(label)
        return list(found.values()), written

    def _unreadable(self, formats: Formats, column: Column, keys: Sequence[Key], kept: Sequence[int]) -> UserError:
        distinct = {keys[row] for row in kept}
        nearest = max(formats, key=lambda name: len(distinct & formats[name].keys()))
        known = set().union(*(ids.keys() for ids in formats.values()))
        unknown = [row for row in kept if keys[row] not in known]
        row = unknown[0] if unknown else next(row for row in kept if keys[row] not in formats[nearest])
        value = column.values[row]
        what = f"{column.table.at(row)}: {self.task.label} is {shown(value)}"
        if not unknown:
            other = next(row for row in kept if keys[row] in formats[nearest])
            return UserError(
                f"{what}, and {shown(column.values[other])} in {column.table.row_name(other)} is one of {nearest}; expected "
                f"one format in all rows\n{_one_format(self.task)}"
            )
        if column.names is not None and type(value) is int and 0 <= value < len(column.names):
            value = column.names[value]
            what += f", whose ClassLabel is {shown(value)}"
        fitting = distinct & formats[nearest].keys()  # the other rows show which format is meant
        what += f"; expected {self._expected({nearest: formats[nearest]} if fitting else formats)}\n"
        numbers = {keys[row][1] for row in kept if keys[row][0] == "number"}
        count = len(formats.get("ids") or self.names or self.task.raw_label_values)
        if keys[row][0] == "number" and min(numbers) in (0, 1) and max(numbers) == min(numbers) + count - 1:
            return UserError(what + _count_from(min(numbers), count))
        if keys[row] in self._named:  # `labels` and `label_values` disagree about it
            return UserError(what + _one_format(self.task))
        return UserError(what + ignore_hint(self.task, value))

    def _expected(self, formats: Formats) -> str:
        values = [" or ".join(json.dumps(raw, default=str) for raw in e) for e in self.task.raw_label_values]
        if self.task.choices is None:
            written = values or (range(len(self.names)) if "ids" in formats else ())
            if written:
                named = zip(written, self.names, strict=True)
                return "one of " + listed(f"{raw} ({name})" for raw, name in named)
        known = values or [json.dumps(name) for name in self.names]
        index = f"the index of the correct choice, 0 to {len(formats['ids']) - 1}" if "ids" in formats else ""
        return ", or ".join(part for part in (f"one of {listed(known)}" if known else "", index) if part)


def common_format(task: Task, splits: Mapping[str, LabelFormat | None], trained_as: str | None = None) -> str | None:
    """Return the common label format of all splits, or `None` if no split has labels to decode.

    `trained_as` is the format of the labels that an artifact was trained on, if known. Raises UserError if there is no
    common format, or the labels are numbers that could be zero-based or one-based.
    """
    known = {split: labels for split, labels in splits.items() if labels is not None}
    if not known:
        return None
    first, *others = known
    common = list(known[first].names)
    for split in others:
        both = [name for name in common if name in known[split].names]
        if not both:
            raise UserError(
                f"{known[split].where}: its labels are {known[split].names[0]}, but those of {first} are {common[0]}; "
                f"expected one format in all splits\n{_one_format(task)}"
            )
        common = both
    ids = frozenset().union(*(labels.ids for labels in known.values()))
    # In a classification, a single id is ambiguous only by chance: a file may contain only examples of one label.
    enough = 0 if task.choices is not None else 1
    if common[0] == "ids" and trained_as != "ids" and 0 not in ids and len(ids) > enough:
        where = " and ".join(labels.where for labels in known.values())
        count = max(labels.count for labels in known.values())
        raise UserError(
            f"{where}: {task.label} is {min(ids)} to {max(ids)} and never 0, so it could be zero-based or one-based\n"
            f"{_count_from(1, count)}; {_count_from(0, count)}"
        )
    return common[0]


def _one_format(task: Task) -> str:
    name = (task.labels or ["A"])[0]
    return (
        "Use one format for all labels, or list all raw values of each label as label_values in the task file, "
        f"such as [[{name[:20]}, 0], …]"
    )


def _count_from(first: int, count: int) -> str:
    """Return the override for labels that are consecutive numbers."""
    numbers = ",".join(map(str, range(first, first + count)))
    if count > 10:
        numbers = f"{first},{first + 1},…,{first + count - 1}"
    return f"If they start at {first}: 'task.label_values=[{numbers}]'"


def ignore_hint(task: Task, value: Any) -> str:
    """Return the override that also ignores a raw label."""
    typed = hydra_value(value) if isinstance(value, (str, int, float, type(None))) else ""
    if not 0 < len(typed) <= 60 or not typed.isprintable():
        value = "VALUE"  # not a value of a config, or one that cannot be typed
    ignored = override("task.ignore_labels", [*task.ignore_labels, value])
    fix = "correct it"
    if task.labels or task.choices:
        fix += ", or add it to the task file (a new class to labels, a different spelling to label_values)"
    return f"If it means that there is no label: '{ignored}'; otherwise, {fix}"
